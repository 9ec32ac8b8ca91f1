"""Estimates what a run will do and cost, before any weight is loaded."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.engines.process_layout import choose_processes
from flexlora.experiment.base import check_length, load_empty, num_processes, resolve_device
from flexlora.experiment.client_plans import config_plans
from flexlora.experiment.config import Config
from flexlora.experiment.corpora import length_sample
from flexlora.experiment.device_ranks import Affordable, Budget, exceeded, time_budget
from flexlora.experiment.gathered import Gathered
from flexlora.experiment.loaded import adapted_shapes
from flexlora.experiment.measured_step import measured_rate
from flexlora.experiment.participants import Participants, gather_participants
from flexlora.experiment.private_rounds import PrivacyEstimate, privacy_estimate, privacy_of
from flexlora.experiment.run_totals import RunTotals, run_totals
from flexlora.experiment.workload import Workload, cost_on_device, measure_workload
from flexlora.federation.clients import ClientSpec, RankPlan, compact_ranks, largest_ranks
from flexlora.limits import num_cores
from flexlora.rounds.costs import ClientCost, DeviceCost, measure_flops_per_second
from flexlora.rounds.devices import DeviceProfile
from flexlora.text import bytes_text
from flexlora.training.length_runs import LARGER, pace_of


@dataclass(frozen=True)
class DeviceEstimate:
    """What clients of one device do and spend in a round, or why they take no part.

    Attributes:
        device: Name of the profile.
        plan: Name of the rank plan; empty when the device is left out.
        ranks: Name of a module -> rank; empty when it is left out.
        num_clients: Clients with this device and plan.
        memory_bytes: The memory of the device.
        cost: Of a round; at the smallest ranks when it is left out.
        limited_by: What keeps chosen ranks from being larger, or what fixed ranks exceed (``memory``, ``time``,
            ``traffic``); ``left out`` with what the smallest ranks exceed.
        fixed_types: Client type -> the limits of the device that its ranks would exceed, empty when they fit.
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
class ClientEstimate:
    """What the clients of one rank plan will do and spend in a round."""

    name: str
    ranks: Mapping[str, int]
    num_clients: int
    cost: ClientCost
    down_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a run will do and cost.

    Attributes:
        totals: Of the whole run.
        types: One per rank plan.
        notes: Sentences on how the estimate was made.
        devices: One per device and rank plan; empty when no devices are simulated.
        privacy: What differential privacy will have cost; None without it.
    """

    totals: RunTotals
    types: Sequence[ClientEstimate]
    notes: Sequence[str]
    devices: Sequence[DeviceEstimate] = ()
    privacy: PrivacyEstimate | None = None

    @property
    def facts(self) -> Sequence[tuple[str, str]]:
        """Pairs of a name and a value for a person."""
        return [*self.totals.facts(), *([] if self.privacy is None else [self.privacy.fact()])]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: numbers, and notes in words."""
        return {
            "run": {**dataclasses.asdict(self.totals), "seconds": self.totals.seconds},
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
            "privacy": None if self.privacy is None else dataclasses.asdict(self.privacy),
            "notes": list(self.notes),
        }


# Further ones are taken to gain nothing.
_MOST_SCORING_THREADS = 8


ESTIMATE_NOTES = (
    "Memory and time are estimates from shapes and a short measurement of this machine; transfers follow from the "
    "factors' shapes, with a folded tail at its most and no direction left out. Server work comes on top.",
)


DEVICE_NOTES = (
    "Times on devices are virtual, for a client with the mean number of examples of its row; built-in profiles are "
    "our assumptions.",
)


def estimate_experiment(config: Config) -> Estimate:
    """Return what a run will do and cost; reads data and tokenizer, but no weights."""
    resolve_device(config.model.device)
    participants = gather_participants(config)
    base, tokenizer = load_empty(config)
    workload = participants.workload
    if workload is None:
        workload = measure_workload(config, length_sample(participants.corpus), base, tokenizer)
    check_length(base.config, config.data.max_length)
    shapes = adapted_shapes(workload.shapes, participants.plans.values())
    folded_ranks = _folded_ranks(config, participants, shapes)
    num_processes, flops_per_second, scoring_rate = _measure_machine(config, workload, participants, base, tokenizer)
    types = []

    def cost_of(own: Sequence[ClientSpec]) -> tuple[ClientCost, int]:
        """Return what clients of one plan spend, and the bytes that each is sent."""
        ranks = own[0].plan.resolve(shapes)
        cost = workload.cost(ranks, _mean_examples(own), flops_per_second)
        return cost, cost.transfer_bytes + workload.tail_bytes(ranks, folded_ranks)

    for name, plan in participants.plans.items():
        own = [client for client in participants.clients if client.plan == plan]
        cost, down_bytes = cost_of(own)
        types.append(ClientEstimate(name, compact_ranks(plan.resolve(shapes), shapes), len(own), cost, down_bytes))

    def traffic_of(own: Sequence[ClientSpec]) -> tuple[float, float, float]:
        """Return seconds, bytes up and bytes down of clients of one plan."""
        cost, down_bytes = cost_of(own)
        return cost.train_seconds, cost.up_bytes, down_bytes

    totals = run_totals(Gathered(config, participants, shapes), workload, traffic_of, num_processes, scoring_rate)
    devices = _device_estimates(config, participants, workload, shapes, folded_ranks)
    notes = participants.warnings + workload.notes + ESTIMATE_NOTES + _method_notes(config, workload, shapes)
    notes += DEVICE_NOTES if devices else ()
    if config.rounds.error_feedback:
        numbers = sum(row.num_clients * row.cost.num_trainable for row in types)
        notes += (
            f"Once all clients have trained, what they remember of rounding takes {bytes_text(8 * numbers)} of memory "
            "and of every checkpoint.",
        )
    return Estimate(totals, types, notes, devices, _privacy(config, totals, shapes, participants))


def _privacy(
    config: Config, totals: RunTotals, shapes: Mapping[str, tuple[int, int]], participants: Participants
) -> PrivacyEstimate | None:
    """Return what differential privacy will have cost by the end of the run."""
    ranks = largest_ranks(participants.plans.values(), shapes)
    size, method = totals.num_counted, config.method
    privacy = privacy_of(config, method.traits(), totals.num_clients, size, ranks, method.name)
    return None if privacy is None else privacy_estimate(privacy, config.rounds.num_rounds)


# The names that they had first; everywhere else a plan is a rank plan.
Plan, plan_experiment = Estimate, estimate_experiment


def _folded_ranks(
    config: Config, participants: Participants, shapes: Mapping[str, tuple[int, int]]
) -> Mapping[str, int]:
    """Return module path -> rank up to which the tail is sent along; empty when it is not, or has no such bound."""
    traits = config.method.traits()
    if not traits.folds_tail or traits.folds_into_base:
        return {}
    ranks = largest_ranks(participants.plans.values(), shapes)
    return ranks if traits.server_rank is None else dict.fromkeys(ranks, traits.server_rank)


def _method_notes(config: Config, workload: Workload, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Return in what the messages of a method differ from what is counted."""
    traits, name, notes = config.method.traits(), config.method.name, []
    if not traits.sends_both_factors:
        notes.append(
            f"Traffic is counted as if both factors travelled both ways each round; {name} sends other parts of them, "
            "and a run records what it really sent."
        )
    if traits.folds_into_base:
        most = workload.tail_bytes({}, {module: min(shape) for module, shape in shapes.items()})
        notes.append(
            f"Traffic leaves out what {name} has folded, which each client receives in every round after the first: it "
            f"grows with the rounds, up to {bytes_text(most)} a client."
        )
    return tuple(notes)


def _measure_machine(
    config: Config,
    workload: Workload,
    participants: Participants,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[int, float, float]:
    """Return how many processes a run will use here, and the operations a second of one of them and of scoring."""
    model, shape, device = config.model, workload.base, resolve_device(config.model.device)
    children, threads = choose_processes(device, shape.num_parameters, num_processes(config), model.num_threads)
    number = 1 + len(children)
    torch.set_num_threads(threads)
    if pace_of(device, shape.num_parameters) == LARGER:
        plans = Counter(client.plan for client in participants.clients)
        ((plan, _),) = plans.most_common(1)
        rate = measured_rate(config, base, tokenizer, workload, plan, number)
        if rate is not None:
            # One process scores, with all threads unless their number is set.
            more = 1.0 if model.num_threads else max(1.0, min(num_cores(), _MOST_SCORING_THREADS) / threads)
            return number, rate, rate * more
    tokens = int(workload.batch_tokens)
    rate = measure_flops_per_second(shape.hidden_size, shape.intermediate_size, tokens, device)
    return number, rate, rate


def _device_estimates(
    config: Config,
    participants: Participants,
    workload: Workload,
    shapes: Mapping[str, tuple[int, int]],
    folded_ranks: Mapping[str, int],
) -> list[DeviceEstimate]:
    """Return one estimate per device and rank plan that occur together, and one per device that is left out."""
    seconds, seconds_from = time_budget(config)
    budget = Budget((1,), seconds, config.devices.round_bytes, seconds_from)
    found = []
    for name, profile in participants.devices.items():
        clients = [client for client in participants.clients if client.device == name]

        def cost(plan: RankPlan, clients: Sequence[ClientSpec], profile: DeviceProfile = profile) -> DeviceCost:
            """Return what a round costs clients of this device."""
            ranks = plan.resolve(workload.shapes)
            return cost_on_device(workload, profile, ranks, _mean_examples(clients), folded_ranks)

        fixed_types = {
            type_name: ", ".join(exceeded(profile, cost(plan, clients), budget))
            for type_name, plan in config_plans(config).items()
        }
        for plan in sorted({client.plan for client in clients}, key=lambda plan: plan.name):
            own = [client for client in clients if client.plan == plan]
            spent = cost(plan, own)
            if config.clients.ranks_from == "devices":
                limited_by = ", ".join(participants.affordable[plan.name].limited_by) or "largest rank allowed"
            else:
                limited_by = ", ".join(exceeded(profile, spent, budget))
            ranks = compact_ranks(plan.resolve(shapes), shapes)
            found.append(
                DeviceEstimate(name, plan.name, ranks, len(own), profile.memory_bytes, spent, limited_by, fixed_types)
            )
    return [*found, *(_left_out(device) for device in participants.left_out)]


def _left_out(device: Affordable) -> DeviceEstimate:
    profile, why = device.profile, f"left out: {', '.join(device.limited_by)}"
    return DeviceEstimate(profile.name, "", {}, 0, profile.memory_bytes, device.cost, why, {})


def _mean_examples(clients: Sequence[ClientSpec]) -> float:
    return sum(client.num_examples for client in clients) / len(clients)
