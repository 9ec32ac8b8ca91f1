"""Who takes part in a run, and with what data: configuration -> examples and client specifications."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
)
from flexlora.model import load_empty_model
from flexlora.partition import fixed_validation
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
        affordable: What each device affords, left out ones included; empty unless ranks are chosen from devices.
        workload: What rounds take; None when no devices are simulated.
    """

    corpus: FederatedCorpus
    validation: tuple[Example, ...]
    clients: tuple[ClientSpec, ...]
    plans: Mapping[str, RankPlan]
    warnings: tuple[str, ...]
    devices: Mapping[str, DeviceProfile] = field(default_factory=dict)
    affordable: Mapping[str, Affordable] = field(default_factory=dict)
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
    affordable: dict[str, Affordable] = {}
    if config.clients.ranks_from == "devices":
        assert workload is not None, "the configuration has been checked"
        affordable = _affordable(config, corpus, workload, profiles, device_of)
        plan_of = {client_id: affordable[device_of[client_id]].plan for client_id in ids}
        warnings = (*warnings, *_left_out_devices(affordable, device_of))
    else:
        plan_of = _plan_of_each(ids, config_plans(config), config, device_of)
    clients = tuple(
        ClientSpec(client_id, plan, len(splits.train), splits.category, device_of[client_id])
        for client_id, splits in sorted(corpus.clients.items())
        if (plan := plan_of[client_id]) is not None
    )
    if affordable and not clients:
        raise ClientError(f"no device affords any rank. {' '.join(_left_out_devices(affordable, device_of))}")
    used = {client.plan.name: client.plan for client in clients}
    _require_one_rank(config, used)
    had = {client.device for client in clients}
    devices = {name: profile for name, profile in profiles.items() if name in had}
    return Participants(
        corpus, validation, clients, dict(sorted(used.items())), warnings, devices, affordable, workload
    )


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


def clock_of(config: Config, participants: Participants, method: str, cohort_size: int) -> Clock | None:
    """Return the virtual clock of a loop of ``method``; None when no devices are simulated.

    A method that cannot add late changes up, as that of a reference, waits where the run does not.
    """
    workload, settings = participants.workload, config.clock.model_dump(exclude={"policy", "buffer_size"})
    if workload is None:
        return None
    name = config.clock.policy
    if name == "async" and method != "flexlora":
        name = "wait"
    buffer_size = config.clock.buffer_size or max(1, cohort_size // 2)

    @cache
    def ranks_of(plan: RankPlan) -> dict[str, int]:
        return plan.resolve(workload.shapes)

    def cost_of(client: ClientSpec) -> ClientCost:
        rate = participants.devices[client.device].flops_per_second * STEP_RATE
        return workload.cost(ranks_of(client.plan), client.num_examples, rate)

    return Clock(participants.devices, cost_of, Policy(name=name, buffer_size=buffer_size, **settings), config.seed)


def rank_choices(config: Config) -> tuple[int, ...]:
    """Return the ranks that devices choose from, ascending."""
    devices = config.devices
    if devices.rank_choices:
        return tuple(sorted(set(devices.rank_choices)))
    return tuple(1 << power for power in range(devices.max_rank.bit_length()))


def _affordable(
    config: Config,
    corpus: FederatedCorpus,
    workload: Workload,
    profiles: Mapping[str, DeviceProfile],
    device_of: Mapping[str, str],
) -> dict[str, Affordable]:
    """Return what each device affords that a client has, for its clients' mean number of examples."""
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for client_id, device in device_of.items():
        sizes[device].append(len(corpus.clients[client_id].train))
    budget = Budget(rank_choices(config), config.devices.round_seconds, config.devices.round_bytes)
    folded: dict[str, int] = {}
    if isinstance(config.method, FlexLoraMethod) and config.method.fold_tail:
        # What the other devices can afford is not known yet: the tail is counted at its most.
        folded = dict.fromkeys(workload.shapes, config.method.server_rank or max(budget.choices))

    def afforded(profile: DeviceProfile) -> Affordable:
        mean = sum(sizes[profile.name]) / len(sizes[profile.name])
        return affordable_ranks(
            profile, budget, workload.shapes, lambda ranks: cost_on_device(workload, profile, ranks, mean, folded)
        )

    return {name: afforded(profile) for name, profile in profiles.items() if name in sizes}


def _left_out_devices(affordable: Mapping[str, Affordable], device_of: Mapping[str, str]) -> list[str]:
    """Return a sentence for each device that affords nothing."""
    return [
        f"Left out: {list(device_of.values()).count(name)} clients with the device {name}: {found.reason}."
        for name, found in affordable.items()
        if found.plan is None
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
