"""What a run will do and cost, before any weight is loaded."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flexlora.engines.processes import plan_processes
from flexlora.experiment.base import base_name, check_length, resolve_device
from flexlora.experiment.config import Config
from flexlora.experiment.corpora import length_sample
from flexlora.experiment.device_ranks import Budget, exceeded, time_budget
from flexlora.experiment.loaded import adapted_shapes
from flexlora.experiment.participants import Participants, config_plans, gather_participants, policy_of
from flexlora.experiment.round_loop import cohort_size
from flexlora.experiment.workload import Workload, cost_on_device, measure_workload
from flexlora.federation.clients import ClientSpec, RankPlan, compact_ranks, largest_ranks
from flexlora.rounds.clock import clients_per_round
from flexlora.rounds.costs import BaseShape, ClientCost, DeviceCost, measure_flops_per_second
from flexlora.rounds.devices import DeviceProfile
from flexlora.text import bytes_text, seconds_text
from flexlora.training.base_model import load_empty_model


@dataclass(frozen=True)
class DeviceRow:
    """What clients of one device do and spend in a round, or why they take no part.

    Attributes:
        device: Name of the profile.
        plan: Name of the rank plan; empty when the device is left out.
        ranks: Name of a module -> rank; empty when it is left out.
        num_clients: Clients with this device and plan.
        memory_bytes: What the device has.
        cost: Of a round, at the smallest ranks when it is left out.
        limited_by: What keeps chosen ranks from being larger, what fixed ones exceed (``memory``, ``time``,
            ``traffic``), or ``left out`` with what the smallest ranks exceed.
        fixed_types: Client type -> what of the device its ranks would exceed, empty when they fit.
    """

    device: str
    plan: str
    ranks: Mapping[str, int]
    num_clients: int
    memory_bytes: float
    cost: DeviceCost
    limited_by: str
    fixed_types: Mapping[str, str]


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
        devices: One row per device and rank plan; empty when no devices are simulated.
    """

    facts: Sequence[tuple[str, str]]
    types: Sequence[PlanRow]
    notes: Sequence[str]
    devices: Sequence[DeviceRow] = ()

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
            "devices": [
                {**dataclasses.asdict(row), "seconds": row.cost.seconds, "ranks": dict(row.ranks)}
                for row in self.devices
            ],
            "notes": list(self.notes),
        }


def plan_experiment(config: Config) -> Plan:
    """Return what a run will do and cost; reads data and tokenizer, but no weights."""
    participants = gather_participants(config)
    base, tokenizer = load_empty_model(
        base_name(config), revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
    )
    sample = length_sample(participants.corpus)
    workload = participants.workload or measure_workload(config, sample, base, tokenizer)
    check_length(base.config, config.data.max_length)
    shapes = adapted_shapes(workload.shapes, participants.plans.values())
    device = resolve_device(config.model.device)
    shape, tokens, model = workload.base, int(workload.batch_tokens), config.model
    children, threads = plan_processes(device, shape.num_parameters, model.num_processes, model.num_threads)
    torch.set_num_threads(threads)
    rate = measure_flops_per_second(shape.hidden_size, shape.intermediate_size, tokens, device)
    server_ranks = largest_ranks(participants.plans.values(), shapes)
    traits = config.method.traits()
    if traits.server_rank is not None:
        server_ranks = dict.fromkeys(server_ranks, traits.server_rank)
    folded_ranks = server_ranks if traits.folds_tail else {}
    rows = []
    for name, plan in participants.plans.items():
        ranks = plan.resolve(shapes)
        own = [client for client in participants.clients if client.plan == plan]
        cost = workload.cost(ranks, _mean_examples(own), rate)
        down_bytes = cost.transfer_bytes + workload.tail_bytes(ranks, folded_ranks)
        rows.append(PlanRow(name, compact_ranks(ranks, shapes), len(own), cost, down_bytes))
    per_round = cohort_size(config, len(participants.clients))
    facts = _plan_facts(config, participants, shape, rows, per_round, 1 + len(children))
    devices = _device_rows(config, participants, workload, shapes, folded_ranks) if participants.devices else []
    return Plan(facts, rows, participants.warnings + PLAN_NOTES + (DEVICE_NOTES if devices else ()), devices)


PLAN_NOTES = (
    "Memory and time are estimates from shapes and a short measurement of this machine; transfers follow from the "
    "factors' shapes, and a folded tail is counted at its most. Server work and evaluation come on top.",
)


DEVICE_NOTES = (
    "Times on devices are virtual, for a client with the mean number of examples of its row; built-in profiles are "
    "assumptions of ours.",
)


def _device_rows(
    config: Config,
    participants: Participants,
    workload: Workload,
    shapes: Mapping[str, tuple[int, int]],
    folded_ranks: Mapping[str, int],
) -> list[DeviceRow]:
    """Return one row per device and rank plan that occur together, and one per device that is left out."""
    settings, rows = config.devices, list[DeviceRow]()
    seconds, seconds_from = time_budget(config)
    budget = Budget((1,), seconds, settings.round_bytes, seconds_from)
    chosen = config.clients.ranks_from == "devices"
    for name, profile in participants.devices.items():
        clients = [client for client in participants.clients if client.device == name]
        mean = _mean_examples(clients)

        def cost(plan: RankPlan, examples: float, profile: DeviceProfile = profile) -> DeviceCost:
            return cost_on_device(workload, profile, plan.resolve(workload.shapes), examples, folded_ranks)

        fixed_types = {
            type_name: ", ".join(exceeded(profile, cost(plan, mean), budget))
            for type_name, plan in config_plans(config).items()
        }
        for plan in sorted({client.plan for client in clients}, key=lambda plan: plan.name):
            own = [client for client in clients if client.plan == plan]
            spent = cost(plan, _mean_examples(own))
            if chosen:
                limited_by = ", ".join(participants.affordable[plan.name].limited_by) or "largest rank allowed"
            else:
                limited_by = ", ".join(exceeded(profile, spent, budget))
            ranks = compact_ranks(plan.resolve(shapes), shapes)
            rows.append(
                DeviceRow(name, plan.name, ranks, len(own), profile.memory_bytes, spent, limited_by, fixed_types)
            )
    for found in participants.left_out:
        memory, why = found.profile.memory_bytes, f"left out: {', '.join(found.limited_by)}"
        rows.append(DeviceRow(found.profile.name, "", {}, 0, memory, found.cost, why, {}))
    return rows


def _mean_examples(clients: Sequence[ClientSpec]) -> float:
    return sum(client.num_examples for client in clients) / len(clients)


def _plan_facts(
    config: Config,
    participants: Participants,
    shape: BaseShape,
    rows: Sequence[PlanRow],
    per_round: int,
    processes: int,
) -> list[tuple[str, str]]:
    num_clients, num_rounds = len(participants.clients), config.rounds.num_rounds

    sent, counted = per_round, per_round
    if participants.devices:
        policy = policy_of(config, config.method.traits(), per_round)
        sent = min(num_clients, clients_per_round(policy, per_round))
        counted = sent if policy.name == "async" else min(sent, per_round)

    def per_run(value: Callable[[PlanRow], float]) -> float:
        return num_rounds * sum(row.num_clients * value(row) for row in rows) / num_clients

    examples = sum(client.num_examples for client in participants.clients)
    seconds = counted * per_run(lambda row: row.cost.train_seconds) / (processes if config.ray is None else 1)
    where = "on this machine" if processes == 1 else f"on this machine, by {processes} processes"
    return [
        ("Base model", f"{config.model.name_or_path}, {shape.num_parameters:,} parameters, {config.model.dtype}"),
        ("Method", config.method.name),
        (
            "Clients",
            f"{num_clients:,} with {examples:,} training examples; {counted} in each of {num_rounds} rounds"
            + (f", {sent} sampled" if sent > counted else ""),
        ),
        ("Unseen tasks", f"{len(participants.corpus.unseen)}"),
        (
            "Traffic of the run",
            bytes_text(per_run(lambda row: sent * row.down_bytes + counted * row.cost.transfer_bytes)),
        ),
        (
            "Local training of the run",
            f"about {seconds_text(seconds)} {where if config.ray is None else 'divided by the actors of the cluster'}",
        ),
    ]
