"""From a configuration to a finished run folder: the only file that knows every other."""

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from flexlora import FlexLoraError, __version__
from flexlora.adapters import merge_into_base, write_adapter
from flexlora.aggregators import AGGREGATORS, STATE_TYPES
from flexlora.aggregators.base import Aggregator
from flexlora.checkpoint import load_latest
from flexlora.clients import (
    Broadcast,
    ClientSpec,
    RankPlan,
    TypeRanks,
    assign_plans,
    compact_ranks,
    count_plans,
    rank_plans,
    stream,
    stream_seed,
)
from flexlora.config import (
    Config,
    ConfigError,
    GeneratedData,
    InstructionsData,
    NaturalInstructionsData,
    RankConfig,
    dump_config,
    load_config,
    parse_config,
)
from flexlora.costs import BaseShape, ClientCost, LocalWork, client_cost, measure_flops_per_second
from flexlora.data.examples import Example, FederatedCorpus
from flexlora.data.generated import all_tasks, as_natural_instructions, split_of
from flexlora.data.instructions import load_instructions
from flexlora.data.natural_instructions import HoldOut, federate, load_natural_instructions, parse_task
from flexlora.data.pretraining import BASE_FOLDER, seen_in_pretraining
from flexlora.data.prompts import IGNORED, EncodedExample, encode_many
from flexlora.engines.simulation import SimulationEngine
from flexlora.evaluation import Score, combine, evaluate
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.product import Split
from flexlora.model import AdaptedModel, load_base_model, load_empty_model, target_modules
from flexlora.partition import fixed_validation
from flexlora.report.page import write_report
from flexlora.report.records import (
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    EvaluationRecord,
    LocalClientRecord,
    LocalOnlyRecord,
    ManifestRecord,
    RankGroupRecord,
    ReferenceRunRecord,
    ReferencesRecord,
    RoundRecord,
    RoundScoreRecord,
    ScoreRecord,
    read_manifest,
    read_records,
    read_references,
    write_manifest,
    write_references,
)
from flexlora.report.tables import bytes_text, describe_ranks, seconds_text
from flexlora.rounds import (
    CHECKPOINTS_FOLDER,
    Federation,
    Loop,
    Outcome,
    RoundEvent,
    RoundSettings,
    adapter_spectra,
    run_rounds,
)
from flexlora.training import LocalTraining, learning_rate_at, train_client

ADAPTERS_FOLDER = "adapters"
CONFIG_FILE = "config.yaml"
FEDIT_FOLDER = Path("references") / "fedit_smallest_rank"
PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "rouge-score")
TOKENISED_CLIENTS_KEPT = 256
DEFAULT_NUM_CLIENTS = 100
TOKEN_SAMPLE = 256


class ExperimentError(FlexLoraError, ValueError):
    """A run that cannot be started, continued or read."""


@dataclass(frozen=True)
class Stage:
    """One part of a run, for progress displays: how many steps it has and how many are done already."""

    title: str
    num_steps: int | None = None
    completed: int = 0


Notify = Callable[[RoundEvent | Stage], None]


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


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    report: Path
    method: str
    server_round: int
    stopped: str | None
    has_progress: bool
    records: Sequence[RoundRecord]
    references: ReferencesRecord

    def summary(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        last = next((record.evaluation for record in reversed(self.records) if record.evaluation), None)
        fedit = self.references.fedit_smallest_rank
        local = self.references.local_only

        def unseen(evaluation: EvaluationRecord | None) -> dict[str, Any] | None:
            return evaluation.unseen.model_dump(mode="json") if evaluation else None

        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "server_round": self.server_round,
            "stopped": self.stopped,
            "has_progress": self.has_progress,
            "unseen": {
                "base": unseen(self.references.base),
                "federated": unseen(last),
                "fedit_smallest_rank": unseen(fedit.final if fedit else None),
                "local_only": local.unseen.model_dump(mode="json") if local and local.unseen else None,
            },
        }


@dataclass(frozen=True)
class PlanRow:
    """What one kind of client will do and spend in a round."""

    name: str
    ranks: Mapping[str, int]
    num_clients: int
    cost: ClientCost
    down_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run will do and cost.

    Attributes:
        facts: Pairs of a name and a value for a person.
        types: One row per rank plan.
        notes: Sentences on how the estimate was made.
    """

    facts: Sequence[tuple[str, str]]
    types: Sequence[PlanRow]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "facts": dict(self.facts),
            "types": {
                row.name: {
                    "ranks": dict(row.ranks),
                    "num_clients": row.num_clients,
                    "down_bytes": row.down_bytes,
                    **dataclasses.asdict(row.cost),
                }
                for row in self.types
            },
            "notes": list(self.notes),
        }


def run_experiment(
    config: Config, folder: Path, *, resume: bool = False, overwrite: bool = False, notify: Notify = lambda event: None
) -> RunResult:
    """Run everything a configuration describes and leave a complete run folder behind.

    Args:
        config: The run.
        folder: Where to write; must not hold another run.
        resume: Go on with the run in ``folder``; it must have the same configuration (``rounds.num_rounds`` may grow).
        overwrite: Delete the run in ``folder`` first.
        notify: Told about every stage and round.

    Raises:
        ExperimentError: If ``folder`` does not suit, or its data or configuration have changed.
        FlexLoraError: If data or model cannot be read.
    """
    _prepare_folder(config, folder, resume, overwrite)
    notify(Stage("Reading data"))
    participants = gather_participants(config)
    workbench = Workbench.load(config, participants, notify)
    _check_manifest(folder, workbench)
    loop = workbench.loop(config.method.model_dump(), participants.clients, folder, notify)
    notify(_rounds_stage(f"Federated rounds ({config.method.name})", loop))
    outcome = run_rounds(loop)
    write_run_adapters(workbench, loop, outcome, folder)
    _measure_references(workbench, loop, folder, notify)
    return RunResult(
        folder=folder,
        report=write_report(folder),
        method=config.method.name,
        server_round=outcome.server_round,
        stopped=outcome.stopped,
        has_progress=outcome.has_progress,
        records=read_records(folder / RECORDS_FILE),
        references=read_references(folder / REFERENCES_FILE),
    )


def _rounds_stage(title: str, loop: Loop) -> Stage:
    # The bar counts clients, so that it moves within a round.
    done = max((record.server_round for record in read_records(loop.folder / RECORDS_FILE)), default=0)
    size = min(loop.settings.cohort_size, len(loop.federation.clients))
    return Stage(title, loop.settings.num_rounds * size, done * size)


def _prepare_folder(config: Config, folder: Path, resume: bool, overwrite: bool) -> None:
    holds_run = (folder / CONFIG_FILE).is_file()
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"--out must be a folder; {folder} is a file")
    if overwrite and not resume and holds_run:
        shutil.rmtree(folder)
        holds_run = False
    if not holds_run and folder.is_dir() and any(folder.iterdir()):
        raise ExperimentError(f"--out must be a new folder or one with a run; {folder} holds other files")
    if holds_run and not resume:
        raise ExperimentError(
            f"{folder} already holds a run; add --resume to go on with it, --overwrite to start anew, "
            "or name another --out"
        )
    if holds_run:
        before = read_run_config(folder).model_dump(mode="json")
        changed = [key for key in _differences(before, config.model_dump(mode="json")) if key != "rounds.num_rounds"]
        if changed:
            raise ExperimentError(
                f"a resumed run must keep its configuration; {folder} differs in {', '.join(changed)}. "
                "Use the settings of its config.yaml, or another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / CONFIG_FILE, dump_config(config))


def _differences(left: Any, right: Any, key: str = "") -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            yield from _differences(left.get(name), right.get(name), f"{key}.{name}" if key else name)
    elif left != right:
        yield key


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_run_config(folder: Path) -> Config:
    """Return the configuration of a run.

    Raises:
        ExperimentError: If ``folder`` is not the folder of a run.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ExperimentError(f"RUN must be the folder of a run, with a {CONFIG_FILE} in it; got {folder}")
    return parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Data and clients


def gather_participants(config: Config) -> Participants:
    """Read the data, deal them to clients and give each client its ranks."""
    if isinstance(config.data, InstructionsData):
        corpus, warnings = _read_rows(config.data, config.seed)
    else:
        is_embedded = config.model.name_or_path == "embedded"
        corpus, warnings = _read_tasks(config.data, config.seed, base_is_embedded=is_embedded)
    rng = stream(config.seed, "validation")
    validation = fixed_validation(corpus.clients, config.data.validation_examples, rng)
    types = config.clients.types
    plans = rank_plans(types if isinstance(types, str) else {name: _type_ranks(own) for name, own in types.items()})
    plan_of = assign_plans(sorted(corpus.clients), plans, config.clients.distribution, config.seed)
    clients = tuple(
        ClientSpec(client_id, plan_of[client_id], len(splits.train), splits.category)
        for client_id, splits in sorted(corpus.clients.items())
    )
    used = {client.plan.name: client.plan for client in clients}
    if config.method.name == "fedit" and len({tuple(sorted(plan.patterns)) for plan in used.values()}) > 1:
        raise ConfigError(
            [
                "method.name=fedit averages factors of one rank, but clients.distribution gives clients "
                f"{', '.join(sorted(used))}; set clients.distribution to a single type, for example "
                f"clients.distribution='{{{min(used)}: 1}}'"
            ],
            "the configuration",
        )
    return Participants(corpus, validation, clients, dict(sorted(used.items())), warnings)


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
        "tasks with too few examples": summary.num_too_small,
        "instances without answer": summary.num_unanswered,
        "test examples that a client trains on": summary.num_leaked,
    }
    return corpus, _left_out(counts)


# ---------------------------------------------------------------------------------------------------------------------
# The model with everything that trains and scores it


@dataclass(frozen=True)
class Workbench:
    """A loaded base model with the participants: what loops, references and evaluations are made from.

    Attributes:
        config: The run.
        participants: Clients and data.
        model: The base, shared by all clients.
        shapes: Module path -> (out_features, in_features) of every module that some client adapts.
        scaling: The scaling rule.
        base_name: What adapters name as their base.
    """

    config: Config
    participants: Participants
    model: AdaptedModel
    shapes: Mapping[str, tuple[int, int]]
    scaling: Scaling
    base_name: str

    @staticmethod
    def load(config: Config, participants: Participants, notify: Notify = lambda event: None) -> "Workbench":
        """Load the base model and find the modules that clients adapt."""
        notify(Stage("Loading the base model"))
        if config.model.num_threads is not None:
            torch.set_num_threads(config.model.num_threads)
        device = resolve_device(config.model.device)
        name = base_name(config)
        base, tokenizer = load_base_model(
            name,
            dtype=config.model.dtype,
            device=device,
            attn_implementation=config.model.attn_implementation,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
        shapes = adapted_shapes(target_modules(base, config.lora.target_modules), participants.plans.values())
        model = AdaptedModel(base, tokenizer, dropout=config.lora.dropout)
        scaling = scaling_rule(config)
        return Workbench(config, participants, model, shapes, scaling, name)

    def loop(self, method: Mapping[str, Any], clients: Sequence[ClientSpec], folder: Path, notify: Notify) -> Loop:
        """Return a round loop of ``method`` over ``clients`` that keeps its files in ``folder``."""
        rounds, training = self.config.rounds, self.config.training
        options = {key: value for key, value in method.items() if key != "name"}
        aggregator: Aggregator[Any] = AGGREGATORS[method["name"]](scaling=self.scaling, **options)
        ranks = largest_ranks({client.plan for client in clients}, self.shapes)
        if (server_rank := options.get("server_rank")) is not None:
            ranks = {module: server_rank for module in ranks}
        seed = stream_seed(self.config.seed, "initial-adapter")
        cohort_size = rounds.cohort_size or max(1, round(rounds.cohort_fraction * len(clients)))

        def learning_rate(server_round: int) -> float:
            return learning_rate_at(
                server_round,
                base=training.learning_rate,
                schedule=training.schedule,
                num_rounds=rounds.num_rounds,
                warmup_rounds=training.warmup_rounds,
                halve_at=training.halve_at,
            )

        return Loop(
            aggregator=aggregator,
            state_types=STATE_TYPES,
            engine=SimulationEngine(
                self.model,
                self.training_examples,
                local_training(self.config),
                learning_rate,
                self.config.seed,
                rounds.wire_dtype,
            ),
            federation=Federation(
                clients=clients,
                shapes=self.shapes,
                server_ranks=ranks,
                initial_adapter=self.model.initial_adapter(ranks, self.scaling, seed),
                scaling=self.scaling,
            ),
            settings=RoundSettings(
                num_rounds=rounds.num_rounds,
                cohort_size=cohort_size,
                seed=self.config.seed,
                evaluate_every=self.config.evaluation.every,
                patience=rounds.patience,
                max_failed_rounds=rounds.max_failed_rounds,
                keep_checkpoints=rounds.keep_checkpoints,
                checkpoint_every=rounds.checkpoint_every,
            ),
            learning_rate=learning_rate,
            evaluator=Scorer(self),
            folder=folder,
            notify=notify,
        )

    def training_examples(self, client_id: str) -> Sequence[EncodedExample]:
        """Return the tokenised training examples of a client."""
        return self._encoded(client_id)

    @cached_property
    def _encoded(self) -> Callable[[str], Sequence[EncodedExample]]:
        data, seed = self.config.data, self.config.seed

        # Bounded, so that memory does not grow with the number of clients.
        @lru_cache(maxsize=TOKENISED_CLIENTS_KEPT)
        def encoded(client_id: str) -> Sequence[EncodedExample]:
            examples = self.participants.corpus.clients[client_id].train
            rng = stream(seed, "answers", client_id)
            return encode_many(
                examples,
                self.model.tokenizer,
                data.template,
                data.max_length,
                loss_on=data.loss_on,
                answer_indices=[int(rng.integers(len(example.outputs))) for example in examples],
            )

        return encoded

    def score(self, adapter: Broadcast | None, tasks: Mapping[str, Sequence[Example]]) -> dict[str, Score]:
        """Return the score of the base with this adapter on each task."""
        data, evaluation = self.config.data, self.config.evaluation
        return evaluate(
            self.model,
            adapter,
            tasks,
            template=data.template,
            max_length=data.max_length,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=evaluation.batch_size,
        )

    def unseen_tasks(self) -> dict[str, Sequence[Example]]:
        """Return the examples that zero-shot scores are about."""
        limit = self.config.data.test_examples_per_task
        return {task: splits.test[:limit] for task, splits in self.participants.corpus.unseen.items()}

    def own_tests(self, clients: Sequence[ClientSpec]) -> dict[str, Sequence[Example]]:
        """Return the test examples of some clients that have any."""
        limit, corpus = self.config.data.test_examples_per_task, self.participants.corpus
        tests = {client.client_id: corpus.clients[client.client_id].test[:limit] for client in clients}
        return {client_id: examples for client_id, examples in tests.items() if examples}

    def sampled_clients(self, per_plan: int, purpose: str) -> dict[str, list[ClientSpec]]:
        """Return up to ``per_plan`` clients of each plan that have test examples, seeded, sorted by id."""
        sampled: dict[str, list[ClientSpec]] = {}
        for name in self.participants.plans:
            candidates = [
                client
                for client in self.participants.clients
                if client.plan.name == name and self.participants.corpus.clients[client.client_id].test
            ]
            order = stream(self.config.seed, purpose, name).permutation(len(candidates))[:per_plan]
            sampled[name] = [candidates[index] for index in sorted(order)]
        return sampled


@dataclass(frozen=True)
class Scorer:
    """Scores adapters for the round loop: unseen tasks, the validation set, and each rank group at the end."""

    workbench: Workbench

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        corpus = self.workbench.participants.corpus
        by_task = self.workbench.score(adapter, self.workbench.unseen_tasks())
        categories: dict[str, list[Score]] = {}
        for task, score in by_task.items():
            categories.setdefault(corpus.unseen[task].category or "all", []).append(score)
        validation = None
        if examples := self.workbench.participants.validation:
            validation = combined_record(self.workbench.score(adapter, {"validation": examples}).values())
        return EvaluationRecord(
            unseen=combined_record(by_task.values()),
            unseen_unweighted=combined_record(by_task.values(), weighted=False),
            categories={name: combined_record(scores) for name, scores in sorted(categories.items())},
            validation=validation,
        )

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return, per plan, the adapter cut to its ranks on the unseen tasks and on its clients' own test data."""
        per_plan = self.workbench.config.evaluation.rank_group_clients
        groups = {}
        for name, clients in self.workbench.sampled_clients(per_plan, "rank-groups").items() if per_plan else ():
            plan = self.workbench.participants.plans[name]
            adapter, own = broadcast(plan), self.workbench.own_tests(clients)
            groups[name] = RankGroupRecord(
                ranks=compact_ranks(plan.resolve(self.workbench.shapes)),
                num_clients=len(own),
                unseen=combined_record(self.workbench.score(adapter, self.workbench.unseen_tasks()).values()),
                own=combined_record(self.workbench.score(adapter, own).values()) if own else None,
            )
        return groups


def combined_record(scores: Iterable[Score], *, weighted: bool = True) -> ScoreRecord:
    """Return the mean over tasks, weighted by their examples or not, as it is recorded."""
    return ScoreRecord(**dataclasses.asdict(combine(list(scores), weighted=weighted)))


def base_parameters(model: AdaptedModel) -> Iterator[torch.Tensor]:
    """Yield the weights of the base model, without those of adapters."""
    return (parameter for name, parameter in model.network.named_parameters() if ".lora_" not in name)


def scaling_rule(config: Config) -> Scaling:
    """Return the rule every client's scaling follows."""
    return Scaling(config.lora.scaling, config.lora.lora_alpha)


def base_name(config: Config) -> str:
    """Return the folder or hub id of the base model."""
    return str(BASE_FOLDER) if config.model.name_or_path == "embedded" else config.model.name_or_path


def resolve_device(name: str) -> str:
    """Return the device that ``auto`` stands for, or the one named.

    Raises:
        ExperimentError: If CUDA is asked for where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ExperimentError(
            f"model.device={name} needs a CUDA device and there is none; use model.device=cpu or auto"
        )
    return name


def adapted_shapes(shapes: Mapping[str, tuple[int, int]], plans: Iterable[RankPlan]) -> dict[str, tuple[int, int]]:
    """Return the shapes of the modules that at least one plan adapts.

    Raises:
        ExperimentError: If a plan adapts none of them.
    """
    adapted: set[str] = set()
    for plan in plans:
        ranks = plan.resolve(shapes)
        if not ranks:
            raise ExperimentError(
                f"clients.types.{plan.name} adapts none of the {len(shapes)} target modules, such as "
                f"{next(iter(shapes))}; its patterns are {', '.join(pattern for pattern, _ in plan.patterns)}"
            )
        adapted |= ranks.keys()
    return {module: shapes[module] for module in sorted(adapted)}


def largest_ranks(plans: Iterable[RankPlan], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return, per module, the largest rank of any plan."""
    ranks: dict[str, int] = {}
    for plan in plans:
        for module, rank in plan.resolve(shapes).items():
            ranks[module] = max(rank, ranks.get(module, 0))
    return dict(sorted(ranks.items()))


def smallest_ranks(plans: Sequence[RankPlan], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return, per module that every plan adapts, the smallest rank: what all clients can afford.

    Where no module is adapted by all, the plan with the fewest parameters decides.
    """
    resolved = [plan.resolve(shapes) for plan in plans]
    shared = set.intersection(*(set(ranks) for ranks in resolved))
    if shared:
        return {module: min(ranks[module] for ranks in resolved) for module in sorted(shared)}
    return min(resolved, key=lambda ranks: sum(rank * sum(shapes[module]) for module, rank in ranks.items()))


def local_training(config: Config) -> LocalTraining:
    """Return the settings of one client's training."""
    training = config.training
    return LocalTraining(
        optimizer=training.optimizer,
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_epochs=training.num_epochs,
        max_steps=training.max_steps,
        max_grad_norm=training.max_grad_norm,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def write_run_adapters(workbench: Workbench, loop: Loop, outcome: Outcome, folder: Path) -> None:
    """Write the global adapter at the server's rank and at the rank of each kind of client."""
    federation = loop.federation
    wanted = {max(federation.server_ranks.values())}
    wanted |= {max(plan.resolve(workbench.shapes).values()) for plan in workbench.participants.plans.values()}
    top = max(federation.server_ranks.values())
    whole = loop.aggregator.broadcast(outcome.state, federation.server_ranks)
    for rank in sorted(rank for rank in wanted if rank <= top):
        adapter = adapter_at_rank(whole, rank, loop.federation.scaling)
        target = folder / ADAPTERS_FOLDER / f"rank-{rank}"
        if target.exists():
            shutil.rmtree(target)
        write_adapter(target, adapter, workbench.base_name)


def adapter_at_rank(adapter: Broadcast, rank: int, scaling: Scaling, split: Split = "b") -> AdapterState:
    """Return the best approximation of an adapter whose modules have at most this rank (Eckart and Young).

    Whatever the method, the change is cut and not its factors, whose rows mean nothing in an order of their own.
    """
    factors = {}
    for module, spectrum in adapter_spectra(adapter).items():
        own = min(rank, adapter.trainable[module].rank)
        factors[module] = spectrum.factors(own, scaling(own), split, adapter.trainable[module].A).to(torch.float32)
    return factors


def _measure_references(workbench: Workbench, loop: Loop, folder: Path, notify: Notify) -> None:
    """Add what the run is compared with, one part after the other, each kept as soon as it is there."""
    path = folder / REFERENCES_FILE
    references = read_references(path)
    if references.base is None:
        first = read_records(folder / RECORDS_FILE)[0]
        references = references.model_copy(update={"base": first.evaluation})
        write_references(path, references)
    evaluation = workbench.config.evaluation
    if evaluation.local_only_clients and references.local_only is None:
        references = references.model_copy(update={"local_only": _local_only(workbench, loop, notify)})
        write_references(path, references)
    if evaluation.fedit_reference and references.fedit_smallest_rank is None:
        references = references.model_copy(update={"fedit_smallest_rank": _fedit_reference(workbench, folder, notify)})
        write_references(path, references)


def _local_only(workbench: Workbench, loop: Loop, notify: Notify) -> LocalOnlyRecord:
    """Train sampled clients alone and compare with what the federation gives them."""
    evaluation, config = workbench.config.evaluation, workbench.config
    plans = max(1, len(workbench.participants.plans))
    sampled = workbench.sampled_clients(-(-evaluation.local_only_clients // plans), "local-only")
    clients = [client for group in sampled.values() for client in group][: evaluation.local_only_clients]
    notify(Stage(f"Training {len(clients)} sampled clients alone", len(clients)))
    settings = dataclasses.replace(local_training(config), num_epochs=evaluation.local_only_epochs, max_steps=None)
    start = loop.aggregator.init(loop.federation.initial_adapter)
    outcome_state = load_state(loop)
    unseen, rows = workbench.unseen_tasks(), []
    for client in clients:
        ranks, own = client.plan.resolve(workbench.shapes), workbench.own_tests([client])
        adapter, _ = train_client(
            workbench.model,
            loop.aggregator.broadcast(start, ranks),
            workbench.training_examples(client.client_id),
            settings,
            config.training.learning_rate,
            stream_seed(config.seed, "local-only", client.client_id),
        )
        alone, together = Broadcast(adapter), loop.aggregator.broadcast(outcome_state, ranks)
        rows.append(
            LocalClientRecord(
                client_id=client.client_id,
                plan=client.plan.name,
                own=combined_record(workbench.score(alone, own).values()),
                global_own=combined_record(workbench.score(together, own).values()),
                base_own=combined_record(workbench.score(None, own).values()),
                unseen=combined_record(workbench.score(alone, unseen).values()),
            )
        )
        notify(RoundEvent("client", 0, len(clients)))
    return LocalOnlyRecord(
        clients=rows,
        own=_mean_record([row.own for row in rows]),
        global_own=_mean_record([row.global_own for row in rows]),
        base_own=_mean_record([row.base_own for row in rows]),
        unseen=_mean_record([row.unseen for row in rows]),
    )


def _mean_record(records: Sequence[ScoreRecord | None]) -> ScoreRecord | None:
    scored = [Score(**record.model_dump()) for record in records if record is not None]
    return combined_record(scored, weighted=False) if scored else None


def _fedit_reference(workbench: Workbench, folder: Path, notify: Notify) -> ReferenceRunRecord:
    """Run FedIT with every client at the ranks that all can afford: same seed, cohorts, rounds and data."""
    ranks = smallest_ranks(list(workbench.participants.plans.values()), workbench.shapes)
    plan = RankPlan("smallest", tuple((f"^{re.escape(module)}$", rank) for module, rank in ranks.items()))
    clients = [dataclasses.replace(client, plan=plan) for client in workbench.participants.clients]
    loop = workbench.loop({"name": "fedit"}, clients, folder / FEDIT_FOLDER, notify)
    rounds = dataclasses.replace(loop.settings, patience=None)
    loop = dataclasses.replace(loop, settings=rounds, evaluator=UnseenScorer(workbench))
    notify(_rounds_stage("Reference: FedIT, every client at the smallest rank", loop))
    run_rounds(loop)
    records = read_records(loop.folder / RECORDS_FILE)
    scored = [(record.server_round, record.evaluation) for record in records if record.evaluation]
    compact = compact_ranks(ranks)
    return ReferenceRunRecord(
        rank=describe_ranks(compact),
        ranks=compact,
        evaluations=[RoundScoreRecord(server_round=number, unseen=scores.unseen) for number, scores in scored],
        final=scored[-1][1],
        up_bytes=sum(record.up_bytes for record in records),
        down_bytes=sum(record.down_bytes for record in records),
    )


@dataclass(frozen=True)
class UnseenScorer:
    """Scores a reference run: as the run itself, without rank groups."""

    workbench: Workbench

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        return Scorer(self.workbench).scores(adapter)

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return none: every client of a reference run has one rank."""
        return {}


def load_state(loop: Loop) -> Any:
    """Return the aggregator's state at the newest checkpoint of a loop.

    Raises:
        ExperimentError: If there is none.
    """
    checkpoint = load_latest(loop.folder / CHECKPOINTS_FOLDER, loop.state_types)
    if checkpoint is None:
        raise ExperimentError(f"{loop.folder} holds no checkpoint; the run must have got past round 0")
    return checkpoint.state


def _check_manifest(folder: Path, workbench: Workbench) -> None:
    """Write the manifest, or compare with the one there: a resumed run must meet the same data."""
    path, manifest = folder / MANIFEST_FILE, _manifest(workbench)
    before = read_manifest(path)
    if before is not None and before.data_hashes != manifest.data_hashes:
        raise ExperimentError(
            f"the data have changed since {folder} was started; restore them or start anew with another --out"
        )
    started = before.started if before else datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(path, manifest.model_copy(update={"started": started}))


def _manifest(workbench: Workbench) -> ManifestRecord:
    config, participants = workbench.config, workbench.participants
    rounds, num_clients = config.rounds, len(participants.clients)
    return ManifestRecord(
        flexlora_version=__version__,
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=platform.platform(),
        seed=config.seed,
        config_hash=hashlib.sha256(dump_config(config).encode()).hexdigest(),
        data_hashes=corpus_hashes(participants.corpus),
        base_model=config.model.name_or_path,
        num_parameters=sum(parameter.numel() for parameter in base_parameters(workbench.model)),
        method=config.method.name,
        num_clients=num_clients,
        num_unseen_tasks=len(participants.corpus.unseen),
        num_rounds=rounds.num_rounds,
        cohort_size=cohort_size(config, num_clients),
        plan_counts=count_plans(client.plan for client in participants.clients),
        plan_ranks={name: compact_ranks(plan.resolve(workbench.shapes)) for name, plan in participants.plans.items()},
        warnings=list(participants.warnings),
    )


def corpus_hashes(corpus: FederatedCorpus) -> dict[str, str]:
    """Return a SHA-256 of the clients' examples and one of the unseen tasks'."""
    hashes = {}
    for name, owners in (("clients", corpus.clients), ("unseen", corpus.unseen)):
        digest = hashlib.sha256()
        for owner, splits in sorted(owners.items()):
            digest.update(repr((owner, splits)).encode())
        hashes[name] = digest.hexdigest()
    return hashes


# ---------------------------------------------------------------------------------------------------------------------
# The other verbs


def plan_experiment(config: Config) -> Plan:
    """Return what a run will do and cost; reads data and tokenizer, but no weights."""
    participants = gather_participants(config)
    base, tokenizer = load_empty_model(
        base_name(config), revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    shapes = adapted_shapes(target_modules(base, config.lora.target_modules), participants.plans.values())
    device = resolve_device(config.model.device)
    training, data, rounds = config.training, config.data, config.rounds
    sample = [
        example
        for client in participants.clients[:TOKEN_SAMPLE]
        for example in participants.corpus.clients[client.client_id].train[:1]
    ]
    encoded = encode_many(sample, tokenizer, data.template, data.max_length, loss_on=data.loss_on)
    lengths = [len(example.input_ids) for example in encoded]
    answers = sum(label != IGNORED for example in encoded for label in example.labels) / len(encoded)
    # A batch is as long as its longest example.
    padded = sum(lengths) / len(lengths) * 1.25
    shape = BaseShape(
        num_parameters=sum(parameter.numel() for parameter in base.parameters()),
        num_layers=base.config.num_hidden_layers,
        hidden_size=base.config.hidden_size,
        intermediate_size=getattr(base.config, "intermediate_size", None) or 4 * base.config.hidden_size,
        vocab_size=base.config.vocab_size,
        bytes_per_parameter={"float32": 4, "bfloat16": 2}[config.model.dtype],
    )
    batch_tokens = training.batch_size * padded
    rate = measure_flops_per_second(shape.hidden_size, shape.intermediate_size, int(batch_tokens), device)
    wire_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[rounds.wire_dtype]
    server_ranks = largest_ranks(participants.plans.values(), shapes)
    rows = []
    for name, plan in participants.plans.items():
        ranks = plan.resolve(shapes)
        own = [client for client in participants.clients if client.plan == plan]
        examples = sum(client.num_examples for client in own) / len(own)
        steps = math.ceil(examples * training.num_epochs / training.batch_size / training.gradient_accumulation_steps)
        work = LocalWork(
            steps=min(steps, training.max_steps or steps),
            batch_tokens=batch_tokens,
            passes_per_step=training.gradient_accumulation_steps,
            answer_tokens=answers * training.batch_size,
            optimizer=training.optimizer,
        )
        cost = client_cost(shape, ranks, shapes, work, rate, wire_bytes)
        folded = config.method.name == "flexlora" and config.method.fold_tail
        tail = sum((rank - ranks.get(module, 0)) * sum(shapes[module]) for module, rank in server_ranks.items())
        down_bytes = cost.transfer_bytes + (tail * wire_bytes if folded else 0)
        rows.append(PlanRow(name, compact_ranks(ranks), len(own), cost, down_bytes))
    per_round = cohort_size(config, len(participants.clients))
    return Plan(_plan_facts(config, participants, shape, rows, per_round), rows, participants.warnings + PLAN_NOTES)


PLAN_NOTES = (
    "Memory and time are estimates from shapes and a short measurement of this machine; transfers are what is "
    "serialised. Server work and evaluation come on top.",
)


def _plan_facts(
    config: Config, participants: Participants, shape: BaseShape, rows: Sequence[PlanRow], per_round: int
) -> list[tuple[str, str]]:
    num_clients, num_rounds = len(participants.clients), config.rounds.num_rounds

    def per_run(value: Callable[[PlanRow], float]) -> float:
        return num_rounds * per_round * sum(row.num_clients * value(row) for row in rows) / num_clients

    examples = sum(client.num_examples for client in participants.clients)
    return [
        ("Base model", f"{config.model.name_or_path}, {shape.num_parameters:,} parameters, {config.model.dtype}"),
        ("Method", config.method.name),
        ("Clients", f"{num_clients:,} with {examples:,} training examples; {per_round} in each of {num_rounds} rounds"),
        ("Unseen tasks", f"{len(participants.corpus.unseen)}"),
        ("Traffic of the run", f"{bytes_text(per_run(lambda row: row.down_bytes + row.cost.transfer_bytes))}"),
        (
            "Local training of the run",
            f"about {seconds_text(per_run(lambda row: row.cost.train_seconds))} on this machine",
        ),
    ]


def cohort_size(config: Config, num_clients: int) -> int:
    """Return how many clients take part in each round."""
    rounds = config.rounds
    return min(num_clients, rounds.cohort_size or max(1, round(rounds.cohort_fraction * num_clients)))


def export_run(run_folder: Path, folder: Path, *, rank: int | None, merged: bool) -> dict[str, Any]:
    """Write the global adapter of a run as a standard PEFT folder, or merged into the whole model.

    Args:
        run_folder: The folder of a run that has got past round 0.
        folder: Where to write; must not exist.
        rank: In 1 to the server's rank; None takes all of it. Modules whose server rank is smaller keep theirs.
        merged: Write base and adapter as one model, with the tokenizer.

    Returns:
        What was written: ``rank``, ``modules`` and, for a merged model, ``merged``.

    Raises:
        ExperimentError: If the run has no checkpoint, the rank is out of range, or ``folder`` exists.
    """
    config = read_run_config(run_folder)
    if folder.exists():
        raise ExperimentError(f"--out must not exist yet; {folder} does")
    aggregator, state, server_ranks = _final_state(config, run_folder)
    top = max(server_ranks.values())
    if rank is not None and not 1 <= rank <= top:
        raise ExperimentError(f"--rank must be in 1..{top}, the server's rank in this run; got {rank}")
    adapter = adapter_at_rank(aggregator.broadcast(state, server_ranks), rank or top, scaling_rule(config))
    if merged:
        base, tokenizer = load_base_model(
            base_name(config),
            dtype=config.model.dtype,
            device="cpu",
            attn_implementation=config.model.attn_implementation,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
        merge_into_base(base, tokenizer, adapter, folder)
    else:
        write_adapter(folder, adapter, base_name(config))
    written: dict[str, Any] = {"rank": rank or top, "modules": len(adapter)}
    return {**written, "merged": True} if merged else written


def _final_state(config: Config, run_folder: Path) -> tuple[Aggregator[Any], Any, dict[str, int]]:
    """Return the method, its newest state and the server's rank per module, without loading the base model."""
    checkpoint = load_latest(run_folder / CHECKPOINTS_FOLDER, STATE_TYPES)
    if checkpoint is None or checkpoint.server_round == 0:
        raise ExperimentError(f"{run_folder} has no round to take an adapter from yet; let the run finish one")
    options = config.method.model_dump(exclude={"name"})
    aggregator = AGGREGATORS[config.method.name](scaling=scaling_rule(config), **options)
    return aggregator, checkpoint.state, dict(checkpoint.progress["server_ranks"])


def evaluate_run(
    run_folder: Path, overrides: Sequence[str] = (), *, rank: int | None = None
) -> dict[str, EvaluationRecord]:
    """Score the base alone and with the adapter of a run on the run's unseen tasks.

    Args:
        run_folder: The folder of a run that has got past round 0.
        overrides: Settings that replace the run's, for example another ``data.path`` or more examples.
        rank: Cut the adapter to this rank first; None takes all of it.

    Raises:
        ExperimentError: If the run has no checkpoint or the rank is out of range.
    """
    read_run_config(run_folder)
    config = load_config(run_folder / CONFIG_FILE, overrides, check_paths=True)
    aggregator, state, server_ranks = _final_state(config, run_folder)
    top = max(server_ranks.values())
    if rank is not None and not 1 <= rank <= top:
        raise ExperimentError(f"--rank must be in 1..{top}, the server's rank in this run; got {rank}")
    workbench = Workbench.load(config, gather_participants(config))
    scorer = Scorer(workbench)
    adapter = aggregator.broadcast(state, server_ranks)
    if rank is not None:
        adapter = Broadcast(adapter_at_rank(adapter, rank, workbench.scaling))
    return {"base model": scorer.scores(None), f"rank {rank or top}": scorer.scores(adapter)}
