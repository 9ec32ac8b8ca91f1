"""Cuts the one model that NVFlare sends to all clients to the rank of each, and says of which methods that can be done.

A controller of NVFlare broadcasts one model. It has the server's rank, directions in the order of their singular
values where the method decomposes, so that rank ``r`` means its first ``r`` directions. In place of a frozen branch a
client takes the directions that it has left over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from flexlora.aggregators.base import Aggregator
from flexlora.aggregators.settings import Traits, traits_of
from flexlora.engines.nvflare.params import NvflareError
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling, ScalingPolicy

RULE_KEY = "flexlora"
"""Key of the rule in the ``meta`` of a model."""

_TRIAL_RANKS = (1, 2, 4)


@dataclass(frozen=True)
class CutRule:
    """What a client must know of the job to take its part of the model.

    Attributes:
        scaling: Gives the scaling of a rank.
        folds_tail: Whether the directions above the client's rank are a branch that it adds and does not train.
        needs_one_rank: Whether all clients must have the server's rank.
    """

    scaling: Scaling
    folds_tail: bool = False
    needs_one_rank: bool = False

    def to_meta(self) -> dict[str, str | float | bool]:
        """Return the rule as plain values."""
        return {
            "scaling": self.scaling.policy,
            "lora_alpha": self.scaling.lora_alpha,
            "folds_tail": self.folds_tail,
            "needs_one_rank": self.needs_one_rank,
        }

    @classmethod
    def from_meta(cls, meta: object) -> "CutRule":
        """Return the rule in the ``meta`` of a model.

        Raises:
            NvflareError: If there is none.
        """
        told = meta.get(RULE_KEY) if isinstance(meta, Mapping) else None
        if not isinstance(told, Mapping):
            raise NvflareError(
                f"the meta of a model from the server must hold {RULE_KEY!r}; got none: does the job use "
                "FlexLoraAggregator, with ScatterAndGather?"
            )
        policy, lora_alpha = told.get("scaling"), told.get("lora_alpha")
        flags = [told.get(name) for name in ("folds_tail", "needs_one_rank")]
        if policy not in get_args(ScalingPolicy) or not is_positive(lora_alpha) or set(map(type, flags)) != {bool}:
            raise NvflareError(f"{RULE_KEY!r} in meta is no rule of this version of flexlora: {dict(told)!r:.300}")
        return cls(Scaling(policy, float(lora_alpha)), *flags)  # type: ignore[arg-type]


def is_positive(value: object) -> bool:
    """Return whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def cut(adapter: AdapterState, ranks: Mapping[str, int], rule: CutRule) -> Broadcast:
    """Return what a client of these ranks starts from.

    Args:
        adapter: The model, at the server's ranks.
        ranks: Module path -> rank of the client, at most the server's.
        rule: Of the job.
    """
    trainable: dict[str, LoraFactors] = {}
    tail: dict[str, LoraFactors] = {}
    for module, own in sorted(adapter.items()):
        rank = ranks[module]
        trainable[module] = own.truncate(rank).with_scaling(rule.scaling(rank))
        if rule.folds_tail and own.B[:, rank:].any():
            tail[module] = LoraFactors(own.A[rank:], own.B[:, rank:], own.scaling)
    return Broadcast(trainable, tail or None)


def check_can_cut(aggregator: Aggregator[Any], name: str, scaling: Scaling) -> None:
    """Raise unless the clients of a method can take their parts from one model.

    Args:
        aggregator: The method with its options.
        name: What messages call it.
        scaling: The rule that it was made with.

    Raises:
        NvflareError: Naming the method and what of it needs more.
    """
    reason = _reason(traits_of(aggregator)) or _trial(aggregator, scaling)
    if reason is not None:
        raise NvflareError(
            f"NVFlare sends one model to all clients, and each takes its first directions; method {name!r}, with these "
            f"options, cannot work like that: {reason}. Take flexlora, aligned or zero_pad, or fedit for one rank"
        )


def _reason(traits: Traits) -> str | None:
    reasons = {
        "its clients keep a part of the model": traits.personal,
        "every client is sent something of its own": traits.per_client,
        "it changes the base weights too": traits.folds_into_base,
        "not both factors are trained and travel": not traits.sends_both_factors,
        "it sends lower ranks than asked for": traits.fewer_directions,
        "it trains more than the factors, or with another loss": not traits.takes_own_training,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _trial(aggregator: Aggregator[Any], scaling: Scaling) -> str | None:
    """Return what is wrong with the parts after a round of a small federation, in which every method can be seen."""
    traits = traits_of(aggregator)
    if traits.needs_one_rank:
        return None
    rng = torch.Generator().manual_seed(0)

    def drawn(rank: int) -> LoraFactors:
        A, B = (torch.randn(shape, generator=rng) for shape in ((rank, 6), (7, rank)))
        return LoraFactors(A, B, scaling(rank))

    most = max(_TRIAL_RANKS)
    first = drawn(most)
    state = aggregator.init({"module": LoraFactors(first.A, torch.zeros_like(first.B), first.scaling)})
    state = aggregator.aggregate(state, [Update(f"{rank}", {"module": drawn(rank)}, 1.0) for rank in _TRIAL_RANKS])
    whole = aggregator.broadcast(state, {"module": most})
    rule = CutRule(scaling, folds_tail=traits.folds_tail)
    for rank in _TRIAL_RANKS:
        sent, part = (aggregator.broadcast(state, {"module": rank}), cut(whole.trainable, {"module": rank}, rule))
        if not _is_same(sent.trainable, part.trainable):
            return "what it sends to a smaller rank is not the first directions of what it sends to a larger one"
        if not _is_same(sent.frozen or {}, part.frozen or {}):
            return "its frozen branch holds more than the directions that a client leaves over"
    return None


def _is_same(one: AdapterState, other: AdapterState) -> bool:
    """Return whether two adapters have the same changes and, where they are as wide, the same factors."""
    if one.keys() != other.keys():
        return False
    for module, own in one.items():
        found = other[module]
        pairs = [(own.delta(), found.delta())]
        if own.scaling == found.scaling and own.rank == found.rank:
            pairs += [(own.A, found.A), (own.B, found.B)]
        if not all(torch.allclose(left, right.to(left.dtype), rtol=1e-4, atol=1e-4) for left, right in pairs):
            return False
    return True
