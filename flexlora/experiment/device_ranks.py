"""Finds the largest ranks that fit each device's memory, time and traffic."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from flexlora.data.examples import FederatedCorpus
from flexlora.experiment.config import Config
from flexlora.experiment.workload import Workload, cost_on_device
from flexlora.federation.client_types import ATTENTION_PATTERN, type_plan
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.rounds.costs import DeviceCost
from flexlora.rounds.devices import DeviceProfile
from flexlora.text import bytes_text, percent_text, seconds_text


@dataclass(frozen=True)
class Budget:
    """What bounds the ranks of a device besides its memory.

    Attributes:
        choices: Ranks to choose from, ascending.
        round_seconds: Most time for download, training and upload; None is any.
        round_bytes: Most traffic of a round, down and up together; None is any.
        seconds_from: The setting that bounds the time.
    """

    choices: tuple[int, ...]
    round_seconds: float | None = None
    round_bytes: int | None = None
    seconds_from: str = "devices.round_seconds"


@dataclass(frozen=True)
class Affordable:
    """The largest ranks a device can afford.

    Attributes:
        profile: The device.
        plan: Named like the device; None when it cannot afford the smallest ranks.
        cost: Of a round at these ranks, or at the smallest.
        limited_by: What keeps the ranks from being larger, or the smallest from fitting: ``memory``, ``time``,
            ``traffic``; empty when only the largest choice does.
        reason: Why there is no plan, for a person; empty when there is one.
    """

    profile: DeviceProfile
    plan: RankPlan | None
    cost: DeviceCost
    limited_by: tuple[str, ...] = ()
    reason: str = ""


def exceeded(profile: DeviceProfile, cost: DeviceCost, budget: Budget) -> dict[str, str]:
    """Return what a round exceeds, ``memory``, ``time`` or ``traffic`` -> a phrase with both numbers."""
    found = {}
    if cost.memory_bytes > profile.memory_bytes:
        found["memory"] = f"{bytes_text(cost.memory_bytes)} of memory and has {bytes_text(profile.memory_bytes)}"
    if budget.round_seconds is not None and cost.seconds > budget.round_seconds:
        limit = f"{seconds_text(budget.round_seconds)} ({budget.seconds_from})"
        found["time"] = f"{seconds_text(cost.seconds)} a round where {limit} are allowed"
    traffic = cost.down_bytes + cost.up_bytes
    if budget.round_bytes is not None and traffic > budget.round_bytes:
        limit = f"{bytes_text(budget.round_bytes)} (devices.round_bytes)"
        found["traffic"] = f"{bytes_text(traffic)} of traffic a round where {limit} are allowed"
    return found


def affordable_ranks(
    profile: DeviceProfile,
    budget: Budget,
    shapes: Mapping[str, tuple[int, int]],
    cost_of: Callable[[Mapping[str, int]], DeviceCost],
) -> Affordable:
    """Return the largest ranks whose memory, time and traffic fit a device.

    Largest: first the rank that attention and FFN can both have, then that of the FFN, then that of attention. A rank
    is never above the smallest dimension of the modules it is for.

    Args:
        shapes: Module path -> (out_features, in_features) of every module to adapt.
        cost_of: Module path -> rank to the cost of one round on this device.
    """
    is_attention = {module: bool(re.search(ATTENTION_PATTERN, module)) for module in shapes}
    attention_choices = _choices(budget, (shapes[module] for module in shapes if is_attention[module]))
    ffn_choices = _choices(budget, (shapes[module] for module in shapes if not is_attention[module]))

    def cost(attention: int, ffn: int) -> DeviceCost:
        """Return the cost at one rank for attention and one for the FFN."""
        return cost_of({module: attention if is_attention[module] else ffn for module in shapes})

    pairs = sorted(product(attention_choices, ffn_choices), key=lambda pair: (min(pair), pair[1], pair[0]))
    fitting = next((pair for pair in reversed(pairs) if not exceeded(profile, cost(*pair), budget)), None)
    smallest = cost(attention_choices[0], ffn_choices[0])
    if fitting is None:
        found = exceeded(profile, smallest, budget)
        reason = f"at rank {min(pairs[0])} it needs {'; '.join(found.values())}"
        return Affordable(profile, None, smallest, tuple(found), reason)
    limits: set[str] = set()
    for larger in _next_larger(fitting, attention_choices, ffn_choices):
        limits |= exceeded(profile, cost(*larger), budget).keys()
    plan = type_plan(profile.name, *fitting)
    return Affordable(profile, plan, cost(*fitting), tuple(sorted(limits)))


def _choices(budget: Budget, shapes: Iterable[tuple[int, int]]) -> list[int]:
    """Return the ranks to choose from for modules of these shapes; without modules any rank costs nothing."""
    most = min((min(shape) for shape in shapes), default=budget.choices[0])
    return [rank for rank in budget.choices if rank <= most] or [most]


def _next_larger(
    pair: tuple[int, int], attention_choices: Sequence[int], ffn_choices: Sequence[int]
) -> Iterator[tuple[int, int]]:
    attention, ffn = pair
    yield from ((rank, ffn) for rank in attention_choices[attention_choices.index(attention) + 1 :][:1])
    yield from ((attention, rank) for rank in ffn_choices[ffn_choices.index(ffn) + 1 :][:1])


def rank_choices(config: Config) -> tuple[int, ...]:
    """Return the ranks that devices choose from, ascending."""
    devices = config.devices
    if devices.rank_choices:
        return tuple(sorted(set(devices.rank_choices)))
    return tuple(1 << power for power in range(devices.max_rank.bit_length()))


def time_budget(config: Config) -> tuple[float | None, str]:
    """Return the most seconds of a client's round, and the setting that bounds it; a deadline counts too."""
    deadline, own = config.clock.deadline_seconds, config.devices.round_seconds
    if deadline is not None and (own is None or deadline < own):
        return deadline, "clock.deadline_seconds"
    return own, "devices.round_seconds"


def affordable_plans(
    config: Config,
    corpus: FederatedCorpus,
    workload: Workload,
    profiles: Mapping[str, DeviceProfile],
    device_of: Mapping[str, str],
) -> dict[str, Affordable]:
    """Return client id -> what its device affords for its number of examples; equal answers are one object.

    A plan is named after its device, followed by its ranks where clients of the device differ in them.
    """
    seconds, seconds_from = time_budget(config)
    budget = Budget(rank_choices(config), seconds, config.devices.round_bytes, seconds_from)
    folded: dict[str, int] = {}
    traits = config.method.traits()
    if traits.folds_tail and not traits.folds_into_base:
        # What the other devices can afford is not known yet: the tail is counted at its most.
        folded = dict.fromkeys(workload.shapes, traits.server_rank or max(budget.choices))

    @cache
    def afforded(device: str, num_examples: int) -> Affordable:
        """Return what a client with so many examples affords."""
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
        """Return the same with ranks in the plan's name where they differ."""
        own = afforded(device, num_examples)
        if own.plan is None or len(patterns[device]) == 1:
            return own
        ranks = list(dict.fromkeys(str(rank) for _, rank in own.plan.patterns))
        name = f"{device} at {'rank' if len(ranks) == 1 else 'ranks'} {' and '.join(ranks)}"
        return replace(own, plan=replace(own.plan, name=name))

    return {client_id: named(device, len(corpus.clients[client_id].train)) for client_id, device in device_of.items()}


def left_out_clients(chosen: Mapping[str, Affordable], corpus: FederatedCorpus) -> list[str]:
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


def never_there(
    config: Config, workload: Workload, devices: Mapping[str, DeviceProfile], clients: Sequence[ClientSpec]
) -> list[str]:
    """Return a sentence about clients whose updates can never count because memory or time is too short."""
    deadline = config.clock.deadline_seconds
    budget = Budget((1,), deadline, seconds_from="clock.deadline_seconds")

    @cache
    def lacks(device: str, plan: RankPlan, num_examples: int) -> tuple[str, ...]:
        """Return what a round of such a client exceeds."""
        profile, ranks = devices[device], plan.resolve(workload.shapes)
        return tuple(exceeded(profile, cost_on_device(workload, profile, ranks, num_examples, {}), budget))

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
