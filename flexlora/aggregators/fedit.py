"""FedIT: the mean of ``A`` and the mean of ``B`` (arXiv:2305.05644), which needs one rank per module.

``A+ = sum_i w_i A_i``, ``B+ = sum_i w_i B_i`` with ``w_i = n_i / sum n``. The product of the means is not the mean of
the products: it misses ``sum_i w_i (B_i - B+) (A_i - A+)``. With SGD as local optimiser this is FedAvg on the adapter.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from flexlora.aggregators.base import require_server_ranks, weighed
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


@dataclass(frozen=True)
class FedItState:
    """The averaged adapter in float64."""

    adapter: Mapping[str, LoraFactors]


@aggregation_method("fedit")
@dataclass(frozen=True)
class FedIt:
    """Weighted average of the factors at one rank (arXiv:2305.05644); with SGD, the paper's FedAvg.

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(needs_one_rank=True)

    def init(self, adapter: AdapterState) -> FedItState:
        """Return the initial adapter, its scalings taken over by the rule."""
        return FedItState({module: _at_server(adapter[module], self.scaling) for module in sorted(adapter)})

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        """Return the weighted mean of ``A`` and of ``B``, module by module.

        Raises:
            AggregationError: If an update lacks a module or has another rank than the server's adapter.
        """
        return FedItState(mean_factors(state.adapter, _at_one_rank(state.adapter, updates)))

    def broadcast(self, state: FedItState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the averaged adapter in float32; ``ranks`` must be the server's.

        Raises:
            AggregationError: If they are not.
        """
        require_server_ranks(state.adapter, ranks, "the receiving client")
        return Broadcast({module: state.adapter[module].to(torch.float32) for module in sorted(ranks)})

    def spectra(self, state: FedItState) -> dict[str, Spectrum]:
        """Return the decomposed product of the averaged factors; nothing of it was discarded."""
        return {module: spectrum_of(factors) for module, factors in state.adapter.items()}


def _at_one_rank(adapter: AdapterState, updates: Iterable[Update]) -> Iterator[tuple[AdapterState, float]]:
    """Yield factors and weight of each update, checked to have the server's ranks."""
    for update in weighed(adapter, updates):
        ranks = {module: factors.rank for module, factors in update.payload.items()}
        require_server_ranks(adapter, ranks, f"client {update.client_id!r}")
        yield update.payload, update.weight


def _at_server(factors: LoraFactors, scaling: Scaling) -> LoraFactors:
    """Return a float64 copy under the scaling that the rule gives for its rank."""
    return factors.to(torch.float64).with_scaling(scaling(factors.rank))
