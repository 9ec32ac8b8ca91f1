"""Defines clients and their rank plans, and draws the cohort of a round."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexlora.errors import FlexLoraError
from flexlora.federation.streams import stream
from flexlora.patterns import bounded_pattern


class ClientError(FlexLoraError, ValueError):
    """Clients, client types or a cohort that are impossible as asked for."""


@dataclass(frozen=True)
class RankPlan:
    """The LoRA ranks of one kind of client: the first pattern found in a module's path decides.

    Attributes:
        name: What reports call the kind, for example ``type1``.
        patterns: Pairs of a regular expression (searched in the module path) and a rank; rank 0 leaves
            the module out. A module no pattern matches is left out.
    """

    name: str
    patterns: tuple[tuple[str, int], ...]

    def resolve(self, modules: Iterable[str]) -> dict[str, int]:
        """Return module path -> rank for the modules this plan adapts, sorted by path.

        Raises:
            PatternError: If a pattern takes too long to match.
        """
        ranks: dict[str, int] = {}
        for module in sorted(modules):
            rank = next((rank for pattern, rank in self.patterns if bounded_pattern(pattern).found_in(module)), 0)
            if rank > 0:
                ranks[module] = rank
        return ranks


@dataclass(frozen=True)
class ClientSpec:
    """Who a client is; never holds data or models.

    Attributes:
        client_id: Unique and stable name; random streams are derived from it.
        plan: Its LoRA ranks.
        num_examples: Number of training examples, the weight of its update.
        category: Task category for tables, empty when unknown.
        device: Name of its device profile, empty when no devices are simulated.
    """

    client_id: str
    plan: RankPlan
    num_examples: int
    category: str = ""
    device: str = ""


def count_plans(plans: Iterable[RankPlan]) -> dict[str, int]:
    """Return plan name -> how many clients have it, sorted by name."""
    return dict(sorted(Counter(plan.name for plan in plans).items()))


def sample_cohort(
    clients: Sequence[ClientSpec], cohort_size: int, seed: int, server_round: int
) -> tuple[ClientSpec, ...]:
    """Return the clients of one round, sorted by id, drawn uniformly without replacement.

    A function of the seed, the round and the set of clients: neither their order nor earlier rounds matter. A cohort
    at least as large as the set is the whole set.

    Raises:
        ClientError: Without clients, with a cohort size below 1, or if two clients share an id.
    """
    if cohort_size < 1:
        raise ClientError(f"rounds.cohort_size must be 1 or more; got {cohort_size}")
    ordered = sorted(clients, key=lambda client: client.client_id)
    unique_ids(client.client_id for client in ordered)
    if not ordered:
        raise ClientError("a round needs at least one client; got none: check what the data's filters leave")
    if cohort_size >= len(ordered):
        return tuple(ordered)
    drawn = stream(seed, "cohort", server_round).choice(len(ordered), size=cohort_size, replace=False)
    return tuple(ordered[index] for index in sorted(drawn.tolist()))


def sample_poisson(
    clients: Sequence[ClientSpec], cohort_size: int, seed: int, server_round: int
) -> tuple[ClientSpec, ...]:
    """Return the clients of one round, sorted by id, each drawn on its own with one probability; maybe none.

    A function of the seed, the round and the set of clients, as ``sample_cohort`` is.

    Args:
        cohort_size: Expected number of clients, which makes the probability ``cohort_size / len(clients)``, at most 1.

    Raises:
        ClientError: Without clients, with a cohort size below 1, or if two clients share an id.
    """
    everybody = sample_cohort(clients, len(clients), seed, server_round) if clients else ()
    if cohort_size < 1 or not everybody:
        return sample_cohort(everybody, cohort_size, seed, server_round)
    drawn = stream(seed, "cohort", server_round).random(len(everybody))
    return tuple(one for one, number in zip(everybody, drawn, strict=True) if number * len(everybody) < cohort_size)


def compact_ranks(ranks: Mapping[str, int], modules: Iterable[str] | None = None) -> dict[str, int]:
    """Return module path -> rank with layers of equal rank folded into the last part of their paths.

    ``{"layers.0.q_proj": 8, "layers.1.q_proj": 8}`` becomes ``{"q_proj": 8}``; modules of one name whose ranks differ,
    or of which some are left out, keep their full paths.

    Args:
        modules: Every module that could have a rank; None means those of ``ranks``.
    """
    found: dict[str, set[int]] = {}
    for module in ranks if modules is None else modules:
        found.setdefault(module.rpartition(".")[2], set()).add(ranks.get(module, 0))
    compact = {}
    for module, rank in ranks.items():
        name = module.rpartition(".")[2]
        compact[name if len(found[name]) == 1 else module] = rank
    return dict(sorted(compact.items()))


def unique_ids(client_ids: Iterable[str]) -> list[str]:
    """Return the ids as a list.

    Raises:
        ClientError: If one occurs twice.
    """
    ids = list(client_ids)
    repeated = [client_id for client_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ClientError(f"client ids must be unique; {repeated[0]!r} occurs {ids.count(repeated[0])} times")
    return ids


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
