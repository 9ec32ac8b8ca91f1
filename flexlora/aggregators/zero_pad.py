"""Zero padding: pad every client's factors with zeros to one rank, average ``A`` and ``B``, cut on dispatch.

With ``w_i = n_i / sum n``

    A+ = sum_i w_i pad(A_i),  B+ = sum_i w_i pad(s_i B_i),  a client of rank r receives A+[:r] and B+[:, :r] / s

It is the aggregation of HetLoRA (arXiv:2401.06432) without its norm weights and its local pruning, and the usual
baseline for clients of different ranks.

``B`` carries the scaling of its client, so that what is averaged is what the client's model used (``nested``).

The known flaws stay, they are the method: the mean has cross terms, and row ``j`` of ``A`` and column ``j`` of ``B``
are both multiplied by the share ``c_j`` of the weight that covers them, so without training the change in that
direction decays with ``c_j^2``. Only what nobody in a round covers is kept as it was: there is nothing to average, and
a direction that is zero in both factors would never learn again.
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
        return ZeroPadState(folded(adapter))

    def aggregate(self, state: ZeroPadState, updates: Iterable[Update]) -> ZeroPadState:
        """Return the weighted mean of the padded factors, module by module.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        kept = within_server_ranks(state.adapter, updates)
        return ZeroPadState(mean_factors(state.adapter, payloads_of(kept)))

    def broadcast(self, state: ZeroPadState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first rows and columns in float32, the client's own scaling divided out of ``B``.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        return Broadcast(first_directions(state.adapter, ranks, self.scaling))

    def spectra(self, state: ZeroPadState) -> dict[str, Spectrum]:
        """Return the decomposed product of the averaged factors; nothing of it was discarded."""
        return spectra_of(state.adapter)
