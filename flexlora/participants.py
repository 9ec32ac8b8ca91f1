"""Who takes part in a run, and with what data: configuration -> examples and client specifications."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from flexlora.clients import (
    ClientError,
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
from flexlora.clock import Clock, Policy
from flexlora.config import (
    Config,
    ConfigError,
    FlexLoraMethod,
    GeneratedData,
    InstructionsData,
    NaturalInstructionsData,
    RankConfig,
)
from flexlora.costs import ClientCost
from flexlora.data.corpus_cache import files_state, kept_corpus, user_cache_folder
from flexlora.data.corpus_file import ExampleFile, store_corpus
from flexlora.data.examples import Example, FederatedCorpus
from flexlora.data.generated import all_tasks, split_of
from flexlora.data.instructions import load_instructions
from flexlora.data.natural_instructions import HoldOut, Task, federate, load_natural_instructions
from flexlora.data.pretraining import BASE_FOLDER, INSTANCES_FILE, seen_in_pretraining
from flexlora.devices import (
    STEP_RATE,
    Affordable,
    Budget,
    DeviceCost,
    DeviceProfile,
    affordable_ranks,
    assign_devices,
    device_cost,
    device_profiles,
    exceeded,
)
from flexlora.model import load_empty_model
from flexlora.partition import fixed_validation
from flexlora.report.tables import percent_text
from flexlora.workload import Workload, measure_workload

# Clients whose first example tells how long texts are.
LENGTH_SAMPLE = 256
# What of ``data`` says how examples are used and not which there are.
NOT_IN_CORPUS = {"template", "max_length", "loss_on", "test_examples_per_task", "validation_examples", "cache"}


@dataclass(frozen=True)
class Participants:
    """The clients of a run and their data, without any model.

    Attributes:
        corpus: All examples.
        validation: The fixed validation set, from clients' validation parts.
        clients: Sorted by id.
        plans: Rank plans that at least one client has, by name.
        warnings: What a person should know, for example how many tasks were left out.
        devices: Profiles of the devices that at least one client has, by name; empty when none are simulated.
        affordable: Name of a plan -> what its device affords, for the client with the most examples of those that have
            it; empty unless ranks are chosen from devices.
        left_out: Of each device with clients that it affords no ranks for, the one with the fewest examples.
        workload: What rounds take; None when no devices are simulated.
    """

    corpus: FederatedCorpus
    validation: tuple[Example, ...]
    clients: tuple[ClientSpec, ...]
    plans: Mapping[str, RankPlan]
    warnings: tuple[str, ...]
    devices: Mapping[str, DeviceProfile] = field(default_factory=dict)
    affordable: Mapping[str, Affordable] = field(default_factory=dict)
    left_out: Sequence[Affordable] = ()
    workload: Workload | None = None

    def in_words(self) -> str:
        """Return how many clients of each type there are, and how many unseen tasks."""
        counts = count_plans(client.plan for client in self.clients)
        types = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        return f"{len(self.clients):,} clients ({types}), {len(self.corpus.unseen)} unseen tasks"


def gather_participants(config: Config) -> Participants:
    """Read the data, deal them to clients and give each client its ranks."""
    corpus, warnings = _corpus_of(config)
    rng = stream(config.seed, "validation")
    validation = fixed_validation(corpus.clients, config.data.validation_examples, rng)
    ids = sorted(corpus.clients)
    profiles, device_of = _devices_of_each(ids, config)
    workload = workload_of(config, corpus) if profiles else None
    chosen: Mapping[str, Affordable] = {}
    if config.clients.ranks_from == "devices":
        assert workload is not None, "the configuration has been checked"
        chosen = _affordable(config, corpus, workload, profiles, device_of)
        plan_of = {client_id: found.plan for client_id, found in chosen.items()}
        warnings = (*warnings, *_left_out_clients(chosen, corpus))
    else:
        plan_of = _plan_of_each(ids, config_plans(config), config, device_of)
    clients = tuple(
        ClientSpec(client_id, plan, len(splits.train), splits.category, device_of[client_id])
        for client_id, splits in sorted(corpus.clients.items())
        if (plan := plan_of[client_id]) is not None
    )
    if chosen and not clients:
        raise ClientError(f"no device affords any rank. {' '.join(_left_out_clients(chosen, corpus))}")
    used = {client.plan.name: client.plan for client in clients}
    _require_one_rank(config, used)
    had = {client.device for client in clients}
    devices = {name: profile for name, profile in profiles.items() if name in had}
    by_size = [chosen[client_id] for client_id in sorted(chosen, key=lambda name: len(corpus.clients[name].train))]
    found = Participants(
        corpus,
        validation,
        clients,
        dict(sorted(used.items())),
        warnings,
        devices,
        affordable={own.plan.name: own for own in by_size if own.plan is not None},
        left_out=list({own.profile.name: own for own in reversed(by_size) if own.plan is None}.values()),
        workload=workload,
    )
    return replace(found, warnings=(*warnings, *_never_there(config, found)))


def _devices_of_each(client_ids: Sequence[str], config: Config) -> tuple[Mapping[str, DeviceProfile], dict[str, str]]:
    """Return the device profiles and client id -> name of its device; no profiles and empty names without devices."""
    devices = config.devices
    profiles = device_profiles(devices.profiles)
    if not profiles:
        return {}, dict.fromkeys(client_ids, "")
    device_of = assign_devices(
        client_ids,
        profiles,
        config.seed,
        distribution=devices.distribution,
        counts=devices.counts,
        assigned=devices.assigned,
    )
    return profiles, device_of


def _require_one_rank(config: Config, used: Mapping[str, RankPlan]) -> None:
    """Raise if the method needs one rank and the clients have several."""
    if config.method.name == "fedit" and len({tuple(sorted(plan.patterns)) for plan in used.values()}) > 1:
        one_type = f"clients.distribution='{{{min(used)}: 1}}' without clients.counts and clients.assigned"
        one_rank = "devices.rank_choices=[1]" if config.clients.ranks_from == "devices" else one_type
        raise ConfigError(
            [
                "method.name=fedit averages factors of one rank, but the clients have the types "
                f"{', '.join(sorted(used))}; give all of them one, for example {one_rank}"
            ],
            "the configuration",
        )


def base_name(config: Config) -> str:
    """Return the folder or hub id of the base model."""
    name = config.model.name_or_path
    return str(BASE_FOLDER) if name == "embedded" else os.path.expanduser(name)


def config_plans(config: Config) -> dict[str, RankPlan]:
    """Return type name -> plan of the types that a configuration defines."""
    types = config.clients.types
    return rank_plans(types if isinstance(types, str) else {name: _type_ranks(own) for name, own in types.items()})


def workload_of(config: Config, corpus: FederatedCorpus) -> Workload:
    """Return what a round takes; reads the base model's shapes and tokenizer, but no weights."""
    base, tokenizer = load_empty_model(
        base_name(config), revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    return measure_workload(config, length_sample(corpus), base, tokenizer)


def length_sample(corpus: FederatedCorpus) -> list[Example]:
    """Return examples that tell how long texts are: the first one of some clients."""
    return [example for _, splits in sorted(corpus.clients.items())[:LENGTH_SAMPLE] for example in splits.train[:1]]


def cost_on_device(
    workload: Workload,
    profile: DeviceProfile,
    ranks: Mapping[str, int],
    num_examples: float,
    folded_ranks: Mapping[str, int],
) -> DeviceCost:
    """Return what a round costs on a device.

    Args:
        ranks: Module path -> rank.
        num_examples: Of the client.
        folded_ranks: Module path -> rank up to which the tail is sent along; empty when it is not.
    """
    cost = workload.cost(ranks, num_examples, profile.flops_per_second * STEP_RATE)
    down_bytes = cost.transfer_bytes + workload.tail_bytes(ranks, folded_ranks)
    return device_cost(profile, cost, down_bytes, cost.transfer_bytes)


def policy_of(config: Config, method: str, cohort_size: int) -> Policy:
    """Return what the server does about clients that differ in speed.

    A method that cannot add late changes up, as that of a reference, waits where the run does not.
    """
    settings = config.clock.model_dump(exclude={"policy", "buffer_size"})
    name = config.clock.policy
    if name == "async" and method != "flexlora":
        name = "wait"
    return Policy(name=name, buffer_size=config.clock.buffer_size or max(1, cohort_size // 2), **settings)


def clock_of(config: Config, participants: Participants, method: str, cohort_size: int) -> Clock | None:
    """Return the virtual clock of a loop of ``method``; None when no devices are simulated."""
    workload = participants.workload
    if workload is None:
        return None

    @cache
    def ranks_of(plan: RankPlan) -> dict[str, int]:
        return plan.resolve(workload.shapes)

    def cost_of(client: ClientSpec) -> ClientCost:
        rate = participants.devices[client.device].flops_per_second * STEP_RATE
        return workload.cost(ranks_of(client.plan), client.num_examples, rate)

    return Clock(participants.devices, cost_of, policy_of(config, method, cohort_size), config.seed)


def rank_choices(config: Config) -> tuple[int, ...]:
    """Return the ranks that devices choose from, ascending."""
    devices = config.devices
    if devices.rank_choices:
        return tuple(sorted(set(devices.rank_choices)))
    return tuple(1 << power for power in range(devices.max_rank.bit_length()))


def time_budget(config: Config) -> tuple[float | None, str]:
    """Return the most seconds of a client's round, and the setting that says so; a deadline bounds it like no other."""
    deadline, own = config.clock.deadline_seconds, config.devices.round_seconds
    if deadline is not None and (own is None or deadline < own):
        return deadline, "clock.deadline_seconds"
    return own, "devices.round_seconds"


def _affordable(
    config: Config,
    corpus: FederatedCorpus,
    workload: Workload,
    profiles: Mapping[str, DeviceProfile],
    device_of: Mapping[str, str],
) -> dict[str, Affordable]:
    """Return client id -> what its device affords for as many examples as it has; one object for equal ones.

    A plan is called like its device, with its ranks behind where clients of the device differ in them.
    """
    seconds, seconds_from = time_budget(config)
    budget = Budget(rank_choices(config), seconds, config.devices.round_bytes, seconds_from)
    folded: dict[str, int] = {}
    if isinstance(config.method, FlexLoraMethod) and config.method.fold_tail:
        # What the other devices can afford is not known yet: the tail is counted at its most.
        folded = dict.fromkeys(workload.shapes, config.method.server_rank or max(budget.choices))

    @cache
    def afforded(device: str, num_examples: int) -> Affordable:
        profile = profiles[device]
        return affordable_ranks(
            profile,
            budget,
            workload.shapes,
            lambda ranks: cost_on_device(workload, profile, ranks, num_examples, folded),
        )

    found = {
        client_id: afforded(device, len(corpus.clients[client_id].train)) for client_id, device in device_of.items()
    }
    patterns: defaultdict[str, set[tuple[tuple[str, int], ...]]] = defaultdict(set)
    for own in found.values():
        if own.plan is not None:
            patterns[own.profile.name].add(own.plan.patterns)

    @cache
    def named(device: str, num_examples: int) -> Affordable:
        own = afforded(device, num_examples)
        if own.plan is None or len(patterns[device]) == 1:
            return own
        ranks = list(dict.fromkeys(str(rank) for _, rank in own.plan.patterns))
        name = f"{device} at {'rank' if len(ranks) == 1 else 'ranks'} {' and '.join(ranks)}"
        return replace(own, plan=replace(own.plan, name=name))

    return {client_id: named(device, len(corpus.clients[client_id].train)) for client_id, device in device_of.items()}


def _left_out_clients(chosen: Mapping[str, Affordable], corpus: FederatedCorpus) -> list[str]:
    """Return a sentence for each device with clients that it affords no rank for."""
    sentences = []
    for name in dict.fromkeys(own.profile.name for own in chosen.values()):
        of_device = [client_id for client_id, own in chosen.items() if own.profile.name == name]
        lost = [client_id for client_id in of_device if chosen[client_id].plan is None]
        if lost:
            smallest = min(lost, key=lambda client_id: len(corpus.clients[client_id].train))
            which = "clients" if len(lost) == len(of_device) else f"of {len(of_device)} clients"
            with_examples = f", with {len(corpus.clients[smallest].train)} examples or more" * (which != "clients")
            sentences.append(
                f"Left out: {len(lost)} {which} with the device {name}{with_examples}: {chosen[smallest].reason}."
            )
    return sentences


def _never_there(config: Config, participants: Participants) -> list[str]:
    """Return a sentence about clients whose updates can never count, for want of memory or time."""
    workload = participants.workload
    if workload is None:
        return []
    deadline = config.clock.deadline_seconds
    budget = Budget((1,), deadline, seconds_from="clock.deadline_seconds")

    @cache
    def lacks(device: str, plan: RankPlan, num_examples: int) -> tuple[str, ...]:
        profile, ranks = participants.devices[device], plan.resolve(workload.shapes)
        return tuple(exceeded(profile, cost_on_device(workload, profile, ranks, num_examples, {}), budget))

    clients = participants.clients
    never = [client for client in clients if lacks(client.device, client.plan, client.num_examples)]
    if not never:
        return []
    causes = Counter(cause for client in never for cause in lacks(client.device, client.plan, client.num_examples))
    share = sum(client.num_examples for client in never) / sum(client.num_examples for client in clients)
    phrases = {"memory": "lack memory at their ranks", "time": f"need more than the {deadline} s of the deadline"}
    why = " and ".join(f"{causes[cause]:,} {phrase}" for cause, phrase in phrases.items() if causes[cause])
    return [
        f"{len(never):,} of {len(clients):,} clients, with {percent_text(share)} of the examples, can send no update "
        f"in any round (before jitter): {why}; clients.ranks_from=devices chooses ranks that fit."
    ]


def _plan_of_each(
    client_ids: Sequence[str], plans: Mapping[str, RankPlan], config: Config, device_of: Mapping[str, str]
) -> dict[str, RankPlan]:
    """Return client id -> plan: those assigned, by name or by device, and the others by counts or distribution."""
    by_device = config.devices.types
    fixed = {
        client_id: plans[by_device[device]] for client_id, device in device_of.items() if device in by_device
    } | fixed_plans(client_ids, plans, config.clients.assigned)
    others = [client_id for client_id in client_ids if client_id not in fixed]
    if config.clients.counts:
        return fixed | deal_plans(others, plans, config.clients.counts, config.seed)
    return fixed | assign_plans(others, plans, config.clients.distribution, config.seed)


def _type_ranks(ranks: RankConfig) -> TypeRanks:
    return {"attention": ranks.attention, "ffn": ranks.ffn, "patterns": ranks.patterns}


def _corpus_of(config: Config) -> tuple[FederatedCorpus, tuple[str, ...]]:
    """Return the corpus and warnings about it, as an earlier run has kept them where it could."""
    data, seed, name = config.data, config.seed, config.model.name_or_path
    is_embedded = name == "embedded" or Path(name).expanduser().resolve() == BASE_FOLDER
    decided_by = {"seed": seed, "data": data.model_dump(mode="json", exclude=NOT_IN_CORPUS)}
    files = None if isinstance(data, GeneratedData) else Path(data.path).expanduser()
    if files is not None and files.exists():
        decided_by["files"] = files_state(files) + files_state(BASE_FOLDER / INSTANCES_FILE)
        decided_by["is_embedded"] = is_embedded

    def read(file: ExampleFile) -> tuple[FederatedCorpus, tuple[str, ...]]:
        if isinstance(data, InstructionsData):
            return _read_rows(data, seed, file)
        return _read_tasks(data, seed, file, base_is_embedded=is_embedded)

    # What a hub id stands for may change without notice.
    can_be_kept = files is None or files.exists()
    return kept_corpus(_cache_folder(data) if can_be_kept else None, decided_by, read)


def _cache_folder(data: GeneratedData | NaturalInstructionsData | InstructionsData) -> Path | None:
    """Return where corpora are kept between runs; other people's texts only where the configuration says so."""
    if data.cache == "none" or (data.cache == "auto" and not isinstance(data, GeneratedData)):
        return None
    return user_cache_folder() if data.cache in ("auto", "user") else Path(data.cache).expanduser()


def _read_rows(data: InstructionsData, seed: int, file: ExampleFile) -> tuple[FederatedCorpus, tuple[str, ...]]:
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
    return store_corpus(file, corpus), _left_out(counts)


def _left_out(counts: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"Left out: {count} {what}." for what, count in counts.items() if count)


def _read_tasks(
    data: GeneratedData | NaturalInstructionsData, seed: int, file: ExampleFile, *, base_is_embedded: bool
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
            file=file,
        )
    else:
        corpus, summary = federate(
            _generated_tasks(data),
            seed,
            hold_out=HoldOut(categories=data.unseen_categories, num_tasks=data.num_unseen_tasks),
            examples_per_client=data.examples_per_task,
            num_clients=data.num_clients,
            file=file,
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


def _generated_tasks(data: GeneratedData) -> Iterator[Task]:
    """Yield the tasks of the generated corpus that clients may have."""
    for task in all_tasks(data.corpus_seed):
        # Those of the pretraining part are never clients, whatever the base: runs stay comparable.
        if split_of(task) == "federated":
            drawn = task.draw(data.examples_per_task * data.clients_per_task, data.corpus_seed)
            examples = tuple(Example(task.definition, text, (answer,)) for text, answer in drawn.items())
            yield Task(task.task_id, task.definition, examples, task.category)
