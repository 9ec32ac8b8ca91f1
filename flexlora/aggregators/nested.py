"""Takes in and hands out one adapter for methods whose clients of rank ``r`` hold its first ``r`` directions.

The server's factors have scaling 1: ``B`` carries the scaling. Ranks differ, so under ``lora_alpha / rank`` scalings
differ too, and averaging raw ``B_i`` would hand a client of rank 2 what one of rank 16 wrote for an eighth of its
scaling. ``A`` stays as it is, because all clients start from rows of the same ``A``, which have to be comparable, and
to start as they were drawn, at every rank.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from flexlora.aggregators.base import require_rank_within, weighed
from flexlora.federation.messages import Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


def folded(adapter: AdapterState) -> dict[str, LoraFactors]:
    """Return a float64 copy with scaling 1, modules sorted."""
    return {module: adapter[module].to(torch.float64).with_scaling(1.0) for module in sorted(adapter)}


def within_server_ranks(adapter: AdapterState, updates: Iterable[Update]) -> Iterator[Update]:
    """Yield the updates one at a time, checked to have no rank above the server's.

    Raises:
        AggregationError: At the update that has one, or that ``weighed`` refuses.
    """
    for update in weighed(adapter, updates):
        for module, factors in update.payload.items():
            require_rank_within(adapter[module], module, factors.rank)
        yield update


def payloads_of(updates: Iterable[Update]) -> Iterator[tuple[AdapterState, float]]:
    """Yield factors and weight of each update."""
    for update in updates:
        yield update.payload, update.weight


def first_directions(adapter: AdapterState, ranks: Mapping[str, int], scaling: Scaling) -> dict[str, LoraFactors]:
    """Return the first rows of ``A`` and columns of ``B`` in float32, the client's own scaling divided out of ``B``.

    Raises:
        AggregationError: If a rank exceeds the server's.
    """
    trainable: dict[str, LoraFactors] = {}
    for module, rank in sorted(ranks.items()):
        require_rank_within(adapter[module], module, rank)
        trainable[module] = adapter[module].truncate(rank).with_scaling(scaling(rank)).to(torch.float32)
    return trainable


def spectra_of(adapter: AdapterState) -> dict[str, Spectrum]:
    """Return the decomposed change of every module; nothing of it was discarded."""
    return {module: spectrum_of(factors) for module, factors in adapter.items()}
