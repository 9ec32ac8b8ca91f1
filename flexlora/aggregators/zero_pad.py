"""Zero padding: pad every client's factors with zeros to one rank, average ``A`` and ``B``, cut on dispatch.

With ``w_i = n_i / sum n``

    A+ = sum_i w_i pad(A_i),  B+ = sum_i w_i pad(s_i B_i),  a client of rank r receives A+[:r] and B+[:, :r] / s

It is the aggregation of HetLoRA (arXiv:2401.06432) without its norm weights and its local pruning, and the usual
baseline for clients of different ranks.

The scaling. Ranks differ, so under ``lora_alpha / rank`` scalings differ too, and averaging raw ``B_i`` would hand a
client of rank 2 what one of rank 16 wrote for an eighth of its scaling. Here ``B`` carries the scaling of its client,
so that what is averaged is what the client's model used; ``A`` stays as it is, because all clients start from rows of
the same ``A`` and those rows have to be comparable (and to start as PEFT made them) at every rank.

The known flaws stay, they are the method: the mean has cross terms, and row ``j`` of ``A`` and column ``j`` of ``B``
are both multiplied by the share ``c_j`` of the weight that covers them, so without training the change in that
direction decays with ``c_j^2``. Only what nobody in a round covers is kept as it was: there is nothing to average, and
a direction that is zero in both factors would never learn again.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from flexlora.aggregators.base import require_rank_within, weighed
from flexlora.aggregators.registry import aggregation_method
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


@dataclass(frozen=True)
class ZeroPadState:
    """The averaged adapter at the largest rank, in float64, with scaling 1: ``B`` carries it."""

    adapter: Mapping[str, LoraFactors]


@aggregation_method("zero_pad")
@dataclass(frozen=True)
class ZeroPad:
    """Factors padded to the largest rank, averaged, truncated on dispatch.

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    def init(self, adapter: AdapterState) -> ZeroPadState:
        """Return the initial adapter, whose ranks are the largest a client may have."""
        return ZeroPadState({module: _folded(adapter[module]) for module in sorted(adapter)})

    def aggregate(self, state: ZeroPadState, updates: Iterable[Update]) -> ZeroPadState:
        """Return the weighted mean of the padded factors, module by module.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        return ZeroPadState(mean_factors(state.adapter, _within_server_ranks(state.adapter, updates)))

    def broadcast(self, state: ZeroPadState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first rows and columns in float32, the client's own scaling divided out of ``B``.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        trainable: dict[str, LoraFactors] = {}
        for module, rank in sorted(ranks.items()):
            require_rank_within(state.adapter[module], module, rank)
            trainable[module] = state.adapter[module].truncate(rank).with_scaling(self.scaling(rank)).to(torch.float32)
        return Broadcast(trainable)

    def spectra(self, state: ZeroPadState) -> dict[str, Spectrum]:
        """Return the decomposed product of the averaged factors; nothing of it was discarded."""
        return {module: spectrum_of(factors) for module, factors in state.adapter.items()}


def _within_server_ranks(adapter: AdapterState, updates: Iterable[Update]) -> Iterator[tuple[AdapterState, float]]:
    """Yield factors and weight of each update, checked to have no rank above the server's."""
    for update in weighed(adapter, updates):
        for module, factors in update.payload.items():
            require_rank_within(adapter[module], module, factors.rank)
        yield update.payload, update.weight


def _folded(factors: LoraFactors) -> LoraFactors:
    """Return a float64 copy with scaling 1."""
    return factors.to(torch.float64).with_scaling(1.0)
