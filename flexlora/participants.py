"""Who takes part in a run, and with what data: configuration -> examples and client specifications."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.clients import (
    ClientSpec,
    RankPlan,
    TypeRanks,
    assign_plans,
    count_plans,
    deal_plans,
    fixed_plans,
    rank_plans,
    stream,
)
from flexlora.config import (
    Config,
    ConfigError,
    GeneratedData,
    InstructionsData,
    NaturalInstructionsData,
    RankConfig,
)
from flexlora.data.examples import Example, FederatedCorpus
from flexlora.data.generated import all_tasks, as_natural_instructions, split_of
from flexlora.data.instructions import load_instructions
from flexlora.data.natural_instructions import HoldOut, federate, load_natural_instructions, parse_task
from flexlora.data.pretraining import BASE_FOLDER, seen_in_pretraining
from flexlora.partition import fixed_validation


@dataclass(frozen=True)
class Participants:
    """The clients of a run and their data, without any model.

    Attributes:
        corpus: All examples.
        validation: The fixed validation set, from clients' validation parts.
        clients: Sorted by id.
        plans: Rank plans that at least one client has, by name.
        warnings: What a person should know, for example how many tasks were left out.
    """

    corpus: FederatedCorpus
    validation: tuple[Example, ...]
    clients: tuple[ClientSpec, ...]
    plans: Mapping[str, RankPlan]
    warnings: tuple[str, ...]

    def in_words(self) -> str:
        """Return how many clients of each type there are, and how many unseen tasks."""
        counts = count_plans(client.plan for client in self.clients)
        types = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        return f"{len(self.clients):,} clients ({types}), {len(self.corpus.unseen)} unseen tasks"


def gather_participants(config: Config) -> Participants:
    """Read the data, deal them to clients and give each client its ranks."""
    if isinstance(config.data, InstructionsData):
        corpus, warnings = _read_rows(config.data, config.seed)
    else:
        name = config.model.name_or_path
        is_embedded = name == "embedded" or Path(name).expanduser().resolve() == BASE_FOLDER
        corpus, warnings = _read_tasks(config.data, config.seed, base_is_embedded=is_embedded)
    rng = stream(config.seed, "validation")
    validation = fixed_validation(corpus.clients, config.data.validation_examples, rng)
    types = config.clients.types
    plans = rank_plans(types if isinstance(types, str) else {name: _type_ranks(own) for name, own in types.items()})
    plan_of = _plan_of_each(sorted(corpus.clients), plans, config)
    clients = tuple(
        ClientSpec(client_id, plan_of[client_id], len(splits.train), splits.category)
        for client_id, splits in sorted(corpus.clients.items())
    )
    used = {client.plan.name: client.plan for client in clients}
    if config.method.name == "fedit" and len({tuple(sorted(plan.patterns)) for plan in used.values()}) > 1:
        raise ConfigError(
            [
                "method.name=fedit averages factors of one rank, but the clients have the types "
                f"{', '.join(sorted(used))}; give all of them one, for example "
                f"clients.distribution='{{{min(used)}: 1}}' without clients.counts and clients.assigned"
            ],
            "the configuration",
        )
    return Participants(corpus, validation, clients, dict(sorted(used.items())), warnings)


def _plan_of_each(client_ids: Sequence[str], plans: Mapping[str, RankPlan], config: Config) -> dict[str, RankPlan]:
    """Return client id -> plan: those assigned by name, and the others by exact counts or by the distribution."""
    fixed = fixed_plans(client_ids, plans, config.clients.assigned)
    others = [client_id for client_id in client_ids if client_id not in fixed]
    if config.clients.counts:
        return fixed | deal_plans(others, plans, config.clients.counts, config.seed)
    return fixed | assign_plans(others, plans, config.clients.distribution, config.seed)


def _type_ranks(ranks: RankConfig) -> TypeRanks:
    return {"attention": ranks.attention, "ffn": ranks.ffn, "patterns": ranks.patterns}


def _read_rows(data: InstructionsData, seed: int) -> tuple[FederatedCorpus, tuple[str, ...]]:
    corpus, summary = load_instructions(
        data.path,
        seed,
        partition=data.partition,
        num_clients=data.num_clients,
        dirichlet_alpha=data.dirichlet_alpha,
        min_examples=data.min_examples,
        label_column=data.label_column,
        client_column=data.client_column,
        columns=data.columns,
        unseen_labels=data.unseen_labels,
        unseen_fraction=0.0 if data.unseen_labels else data.unseen_fraction,
    )
    counts = {
        "rows without prompt or answer": summary.num_empty,
        "rows merged into one with the same prompt": summary.num_repeated,
        "clients with too few rows": summary.num_too_small,
        "test examples that a client trains on": summary.num_leaked,
    }
    return corpus, _left_out(counts)


def _left_out(counts: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"Left out: {count} {what}." for what, count in counts.items() if count)


def _read_tasks(
    data: GeneratedData | NaturalInstructionsData, seed: int, *, base_is_embedded: bool
) -> tuple[FederatedCorpus, tuple[str, ...]]:
    if isinstance(data, NaturalInstructionsData):
        corpus, summary = load_natural_instructions(
            data.path,
            seed,
            hold_out=HoldOut(data.unseen_tasks, data.unseen_categories, data.num_unseen_tasks),
            fraction=data.subsample_fraction,
            max_examples=data.max_examples_per_task,
            min_examples=data.min_examples,
            num_clients=data.num_clients,
            languages=data.languages,
            exclude=seen_in_pretraining if base_is_embedded and data.exclude_pretraining_tasks else None,
        )
    else:
        tasks = (
            parse_task(task.task_id, as_natural_instructions(task, data.examples_per_task, data.corpus_seed))
            for task in all_tasks(data.corpus_seed)
            # Those of the pretraining part are never clients, whatever the base: runs stay comparable.
            if split_of(task) == "federated"
        )
        corpus, summary = federate(
            tasks,
            seed,
            hold_out=HoldOut(categories=data.unseen_categories, num_tasks=data.num_unseen_tasks),
            num_clients=data.num_clients,
        )
    counts = {
        "tasks seen in pretraining": summary.num_seen_in_pretraining,
        "tasks in other languages": summary.num_other_language,
        "tasks with too few examples": summary.num_too_small,
        "instances without answer": summary.num_unanswered,
        "test examples that a client trains on": summary.num_leaked,
    }
    missing = tuple(f"Held-out task {task} was left out too." for task in summary.unseen_left_out)
    return corpus, _left_out(counts) + missing
