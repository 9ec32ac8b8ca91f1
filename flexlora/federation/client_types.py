"""Makes the rank plans of client types and decides which client gets which."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import NotRequired, TypedDict

from flexlora.federation.clients import ClientError, RankPlan, unique_ids
from flexlora.federation.streams import stream, stream_seed
from flexlora.patterns import PatternError, bounded_pattern

# What a path contains when the module is part of attention: a parent such as `self_attn`, `attention` or
# `SelfAttention`, or a projection with a name of its own (`c_attn`, `query_key_value`, `Wqkv`, `q_proj`).
ATTENTION_PATTERN = r"(?i)attn|attention|query_key_value|qkv|(^|\.)[qkvo]_proj$"


# Matches every module, so that whatever is not attention is adapted too, in any architecture.
FFN_PATTERN = r""


PAPER_RANKS = (8, 30, 200)


SMALL_RANKS = (1, 4, 16)


NUM_IDS_SHOWN = 5


DISTRIBUTIONS: Mapping[str, tuple[float, float, float, float]] = MappingProxyType(
    {
        "uniform": (0.25, 0.25, 0.25, 0.25),
        "heavy_tail_light": (0.80, 0.05, 0.05, 0.10),
        "heavy_tail_strong": (0.05, 0.05, 0.10, 0.80),
        "normal": (0.0575, 0.4425, 0.4425, 0.0575),
        "extreme_heavy_tail": (0.90, 0.05, 0.0, 0.05),
    }
)
"""Shares of type 1 to type 4 (arXiv:2402.11505, fig. 3; where figure and released code differ, see below).

``heavy_tail_light`` and ``heavy_tail_strong`` are those of the released code: 80 % of one extreme, although its README
says 85 %. ``normal`` is the intended one, most clients in the middle types; the released code evaluates the density on
labels that are not in the order of the types and gives (5.75, 5.75, 44.25, 44.25) %. The make-up of the paper's
"extreme heavy tail" (its fig. 1, ranks 1, 8 and 200) is not published: ours is 90 % smallest, 5 % type 2, 5 % largest
and no type 3, which with ``four_types(1, 8, 200)`` has the ranks of that figure and no others.
"""


class TypeRanks(TypedDict):
    """The ranks of a client type as a configuration writes them.

    ``patterns`` maps regular expressions over module paths to ranks and comes before the other two.
    """

    attention: int
    ffn: int
    patterns: NotRequired[Mapping[str, int]]


def type_plan(name: str, attention: int, ffn: int, patterns: Mapping[str, int] | None = None) -> RankPlan:
    """Return the plan with one rank for attention projections and one for every other adapted module.

    Args:
        attention: Rank, 0 for no adapter.
        ffn: Rank, 0 for no adapter.
        patterns: Regular expression over module paths -> rank, tried in this order before the other two.

    Raises:
        ClientError: A rank is negative, all are zero, or a pattern is no regular expression.
    """
    pairs = (*(patterns or {}).items(), (ATTENTION_PATTERN, attention), (FFN_PATTERN, ffn))
    for pattern, rank in pairs:
        if rank < 0:
            raise ClientError(f"clients.types.{name}: ranks must be 0 (no adapter) or more; got {rank}")
        try:
            bounded_pattern(pattern)
        except PatternError as error:
            raise ClientError(f"clients.types.{name}.patterns: {error}; write a dot of a module path as \\.") from error
    if not any(rank for _, rank in pairs):
        raise ClientError(f"clients.types.{name} must adapt something; got rank 0 everywhere: raise attention or ffn")
    return RankPlan(name, pairs)


def four_types(smallest: int, middle: int, largest: int) -> dict[str, RankPlan]:
    """Return ``type1`` to ``type4``, the paper's four devices for any three ranks.

    Ranks of attention / FFN: smallest everywhere; middle everywhere; middle / largest; largest everywhere
    (arXiv:2402.11505, table 1, with 8, 30 and 200).

    Raises:
        ClientError: Unless 1 <= smallest <= middle <= largest.
    """
    if not 1 <= smallest <= middle <= largest:
        raise ClientError(
            f"the four types need ranks 1 <= smallest <= middle <= largest; got {smallest}, {middle}, {largest}"
        )
    ranks = ((smallest, smallest), (middle, middle), (middle, largest), (largest, largest))
    return {f"type{i}": type_plan(f"type{i}", attention, ffn) for i, (attention, ffn) in enumerate(ranks, start=1)}


def rank_plans(types: str | Mapping[str, TypeRanks]) -> dict[str, RankPlan]:
    """Return type name -> plan: the four types of ``"paper"`` (8, 30, 200) or ``"small"`` (1, 4, 16), or those given.

    Raises:
        ClientError: For an unknown name, an empty mapping or impossible ranks.
    """
    if isinstance(types, str):
        named = {"paper": PAPER_RANKS, "small": SMALL_RANKS}
        if types not in named:
            raise ClientError(f"clients.types must be paper, small or a mapping of types; got {types!r}")
        return four_types(*named[types])
    if not types:
        raise ClientError("clients.types must name at least one type; got an empty mapping")
    return {
        name: type_plan(name, ranks["attention"], ranks["ffn"], ranks.get("patterns")) for name, ranks in types.items()
    }


def assign_plans(
    client_ids: Iterable[str], plans: Mapping[str, RankPlan], distribution: str | Mapping[str, float], seed: int
) -> dict[str, RankPlan]:
    """Return client id -> plan, each client drawing its own type from the distribution.

    A client's type is a function of the seed and its id: it does not change when clients are added, removed or named
    in another order. Counts therefore vary around the shares as independent draws do; see ``count_plans``.

    Args:
        plans: Type name -> plan; a named distribution takes them, in this order, for type 1 to type 4.
        distribution: A name in ``DISTRIBUTIONS`` (needs four types), or type name -> weight in any unit.

    Raises:
        ClientError: For an unknown distribution or type, or weights that are not a distribution.
    """
    drawn = draw_names(client_ids, type_weights(plans, distribution), seed, "client-type")
    return {client_id: plans[name] for client_id, name in drawn.items()}


def draw_names(client_ids: Iterable[str], weights: Mapping[str, float], seed: int, purpose: str) -> dict[str, str]:
    """Return client id -> a name drawn by weight, a function of the seed, the purpose and the id alone.

    Args:
        weights: Name -> weight, 0 or more and not all 0.
        purpose: Of the random stream.
    """
    names = sorted(name for name, weight in weights.items() if weight > 0)
    bounds = list(accumulate(weights[name] for name in names))
    return {
        client_id: names[_index_of_share(bounds, stream(seed, purpose, client_id).random())]
        for client_id in unique_ids(client_ids)
    }


def deal_plans(
    client_ids: Iterable[str], plans: Mapping[str, RankPlan], counts: Mapping[str, int], seed: int
) -> dict[str, RankPlan]:
    """Return client id -> plan with exactly ``counts`` clients of each type, dealt by the seed and the set of ids.

    Raises:
        ClientError: For an unknown type, a negative count, or counts that do not add up to the number of clients.
    """
    _check_types("clients.counts", plans, counts)
    dealt = deal_names(client_ids, counts, seed, "client-type", "clients")
    return {client_id: plans[name] for client_id, name in dealt.items()}


def deal_names(
    client_ids: Iterable[str], counts: Mapping[str, int], seed: int, purpose: str, section: str
) -> dict[str, str]:
    """Return client id -> name with exactly ``counts`` clients of each, dealt by the seed and the set of ids.

    Args:
        purpose: Of the random stream.
        section: The section of the configuration that ``counts`` comes from, for messages.

    Raises:
        ClientError: For a negative count, or counts that do not add up to the number of clients.
    """
    ids, total = unique_ids(client_ids), sum(counts.values())
    if min(counts.values(), default=0) < 0:
        raise ClientError(f"{section}.counts must be 0 or more; got {dict(counts)}")
    if total != len(ids):
        change = f"{'add' if total < len(ids) else 'take away'} {abs(total - len(ids))}"
        raise ClientError(
            f"{section}.counts must add up to {len(ids)}, the clients that {section}.assigned does not name; "
            f"got {total}: {change}, or leave {section}.counts out and give shares in {section}.distribution"
        )
    order = sorted(ids, key=lambda client_id: (stream_seed(seed, purpose, client_id), client_id))
    names = [name for name in sorted(counts) for _ in range(counts[name])]
    name_of = dict(zip(order, names, strict=True))
    return {client_id: name_of[client_id] for client_id in ids}


def fixed_plans(
    client_ids: Iterable[str], plans: Mapping[str, RankPlan], assigned: Mapping[str, str]
) -> dict[str, RankPlan]:
    """Return client id -> plan of the clients that ``assigned`` gives a type by name.

    Raises:
        ClientError: For a type that is not in ``plans`` or a client that is not in ``client_ids``.
    """
    _check_types("clients.assigned", plans, assigned.values())
    check_known(client_ids, assigned, "clients")
    return {client_id: plans[name] for client_id, name in sorted(assigned.items())}


def check_known(client_ids: Iterable[str], assigned: Iterable[str], section: str) -> None:
    """Raise unless all ``assigned`` clients are among ``client_ids``.

    Raises:
        ClientError: Naming the section of the configuration and some of the clients.
    """
    known, named = sorted(unique_ids(client_ids)), set(assigned)
    unknown = sorted(named - set(known))
    if unknown:
        raise ClientError(
            f"{section}.assigned must name clients of the data; {len(unknown)} of {len(named)} are unknown: "
            f"{_some(unknown)}. The data has {len(known)}: {_some(known)}"
        )


def type_weights(plans: Mapping[str, RankPlan], distribution: str | Mapping[str, float]) -> dict[str, float]:
    """Return type name -> weight, in the unit of the distribution.

    Raises:
        ClientError: For an unknown distribution or type, or weights that are not a distribution.
    """
    if isinstance(distribution, str):
        if distribution not in DISTRIBUTIONS:
            raise ClientError(f"clients.distribution must be one of {', '.join(DISTRIBUTIONS)}; got {distribution!r}")
        shares = DISTRIBUTIONS[distribution]
        if len(plans) != len(shares):
            raise ClientError(
                f"clients.distribution={distribution} is defined for {len(shares)} types; got {len(plans)}: "
                "write clients.distribution as {type: weight}"
            )
        return dict(zip(plans, shares, strict=True))
    _check_types("clients.distribution", plans, distribution)
    if not all(math.isfinite(weight) and weight >= 0 for weight in distribution.values()) or not any(
        distribution.values()
    ):
        raise ClientError(f"weights of clients.distribution must be 0 or more and not all 0; got {dict(distribution)}")
    return dict(distribution)


def _index_of_share(bounds: Sequence[float], uniform: float) -> int:
    """Return the index of the share of ``bounds`` (cumulated weights) that ``uniform`` in [0, 1) falls into."""
    return min(bisect_right(bounds, uniform * bounds[-1]), len(bounds) - 1)


def _check_types(key: str, plans: Mapping[str, RankPlan], named: Iterable[str]) -> None:
    unknown = sorted(set(named) - set(plans))
    if unknown:
        raise ClientError(f"{key} must name types in {', '.join(plans)}; got {', '.join(unknown)}")


def _some(client_ids: Sequence[str]) -> str:
    """Return the first few of the ids for a message."""
    shown = ", ".join(repr(client_id) for client_id in client_ids[:NUM_IDS_SHOWN])
    return shown if len(client_ids) <= NUM_IDS_SHOWN else f"{shown}, ..."
