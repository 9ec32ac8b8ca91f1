"""Takes in and hands out one adapter for methods that need one rank per module on all clients."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from flexlora.aggregators.base import require_server_ranks, weighed
from flexlora.federation.messages import Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling


def at_server(adapter: AdapterState, scaling: Scaling) -> dict[str, LoraFactors]:
    """Return a float64 copy, modules sorted, under the scalings that the rule gives for its ranks."""
    return {
        module: adapter[module].to(torch.float64).with_scaling(scaling(adapter[module].rank))
        for module in sorted(adapter)
    }


def at_one_rank(adapter: AdapterState, updates: Iterable[Update]) -> Iterator[tuple[AdapterState, float]]:
    """Yield factors and weight of each update, checked to have the server's ranks.

    Raises:
        AggregationError: At the update that lacks a module or has another rank, or that ``weighed`` refuses.
    """
    for update in weighed(adapter, updates):
        ranks = {module: factors.rank for module, factors in update.payload.items()}
        require_server_ranks(adapter, ranks, f"client {update.client_id!r}")
        yield update.payload, update.weight


def whole(adapter: AdapterState, ranks: Mapping[str, int]) -> dict[str, LoraFactors]:
    """Return the adapter in float32 for a client whose ranks must be the server's.

    Raises:
        AggregationError: If they are not.
    """
    require_server_ranks(adapter, ranks, "the receiving client")
    return {module: adapter[module].to(torch.float32) for module in sorted(ranks)}
