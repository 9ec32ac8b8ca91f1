"""RoLoRA: clients train ``B`` in odd rounds and ``A`` in even ones, so that every mean has one factor in common.

    round 1, 3, ...:  B+[:, j] = sum_{i: r_i >= j} w_i s_i B_i[:, j] / W_j,   A+ = A
    round 2, 4, ...:  A+[j] = sum_{i: r_i >= j} w_i A_i[j] / W_j,             B+ = B

with ``w_i = n_i / sum n`` and ``W_j = sum_{i: r_i >= j} w_i``; a client of rank ``r`` receives the first ``r``
directions (arXiv:2502.01755). At one rank the mean of each round is the mean of the products, with no cross term.
``B`` comes first because the gradient of ``A`` is zero while ``B`` is. Only the trained factor travels back.

Known flaw: each factor is trained in half of the rounds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora.aggregators.nested import first_directions, folded, payloads_of, spectra_of, within_server_ranks
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum


@dataclass(frozen=True)
class RoLoraState:
    """The adapter and how far training is.

    Attributes:
        adapter: At the largest rank, in float64, with scaling 1: ``B`` carries it.
        num_rounds: Rounds that have been aggregated.
    """

    adapter: Mapping[str, LoraFactors]
    num_rounds: int


@aggregation_method("rolora")
@dataclass(frozen=True)
class RoLora:
    """Mean of ``B`` and mean of ``A`` in turn, each over what the other one was for all (arXiv:2502.01755).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(sends_both_factors=False)

    def init(self, adapter: AdapterState) -> RoLoraState:
        """Return the initial adapter, whose ranks are the largest a client may have."""
        return RoLoraState(folded(adapter), 0)

    def aggregate(self, state: RoLoraState, updates: Iterable[Update]) -> RoLoraState:
        """Return the mean of every direction of the factor that was trained, over its holders.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        payloads = payloads_of(within_server_ranks(state.adapter, updates))
        trained = "A" if state.num_rounds % 2 else "B"
        adapter = mean_factors(state.adapter, payloads, over="holders", averaged=trained)
        return RoLoraState(adapter, state.num_rounds + 1)

    def broadcast(self, state: RoLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first rows and columns in float32, and which factor this round trains.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        trained = "A" if state.num_rounds % 2 else "B"
        return Broadcast(first_directions(state.adapter, ranks, self.scaling), train_factors=trained)

    def spectra(self, state: RoLoraState) -> dict[str, Spectrum]:
        """Return the decomposed change; nothing of it was discarded."""
        return spectra_of(state.adapter)
