"""Dimension-wise means: row ``j`` of ``A`` and column ``j`` of ``B`` are averaged over the clients that hold them.

    A+[j] = sum_{i: r_i >= j} w_i A_i[j] / W_j,   B+[:, j] = sum_{i: r_i >= j} w_i s_i B_i[:, j] / W_j

with ``w_i = n_i / sum n`` and ``W_j = sum_{i: r_i >= j} w_i``; a client of rank ``r`` receives ``A+[:r]`` and
``B+[:, :r] / s``. RBLA (arXiv:2408.08699) and the server of FediLoRA (arXiv:2509.06984). ``B`` carries the scaling of
its client (``nested``).

Nothing decays: an untrained direction stays as it is, unlike under ``zero_pad``. Known flaws: the mean has cross terms
and depends on how a product is split into factors; and a direction that few hold follows those few alone, at full step.

FediLoRA's layer edit is left out: it mixes the broadcast with what the client itself trained in an earlier round,
which needs a factor that is kept and yet sent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora.aggregators.nested import first_directions, folded, payloads_of, spectra_of, within_server_ranks
from flexlora.aggregators.registry import aggregation_method
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class DimensionWiseState:
    """The averaged adapter at the largest rank, in float64, with scaling 1: ``B`` carries it."""

    adapter: Mapping[str, LoraFactors]


@aggregation_method("dimension_wise")
@dataclass(frozen=True)
class DimensionWise:
    """Each direction averaged over the clients that hold it (arXiv:2408.08699, arXiv:2509.06984).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    def init(self, adapter: AdapterState) -> DimensionWiseState:
        """Return the initial adapter, whose ranks are the largest a client may have."""
        return DimensionWiseState(folded(adapter))

    def aggregate(self, state: DimensionWiseState, updates: Iterable[Update]) -> DimensionWiseState:
        """Return the mean of every direction over its holders; one that nobody holds stays.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        payloads = payloads_of(within_server_ranks(state.adapter, updates))
        return DimensionWiseState(mean_factors(state.adapter, payloads, over="holders"))

    def broadcast(self, state: DimensionWiseState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first rows and columns in float32, the client's own scaling divided out of ``B``.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        return Broadcast(first_directions(state.adapter, ranks, self.scaling))

    def spectra(self, state: DimensionWiseState) -> dict[str, Spectrum]:
        """Return the decomposed product of the averaged factors; nothing of it was discarded."""
        return spectra_of(state.adapter)
