"""FedIT: the mean of ``A`` and the mean of ``B`` (arXiv:2305.05644), which needs one rank per module.

``A+ = sum_i w_i A_i``, ``B+ = sum_i w_i B_i`` with ``w_i = n_i / sum n``. The product of the means is not the mean of
the products: it misses ``sum_i w_i (B_i - B+) (A_i - A+)``. With SGD as local optimiser it is ``fedavg``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora.aggregators.base import Noise, require_server_ranks
from flexlora.aggregators.one_rank import at_one_rank, at_server, whole
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, Change, CohortFactors, Update
from flexlora.lora.direction_mean import with_noisy_changes
from flexlora.lora.factor_mean import FactorSums, mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


@dataclass(frozen=True)
class FedItState:
    """The averaged adapter in float64."""

    adapter: Mapping[str, LoraFactors]


@aggregation_method("fedit")
@dataclass(frozen=True)
class FedIt:
    """Weighted average of the factors at one rank (arXiv:2305.05644).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(needs_one_rank=True, secure_sums="factors", private_changes="factors")

    def init(self, adapter: AdapterState) -> FedItState:
        """Return the initial adapter, its scalings taken over by the rule."""
        return FedItState(at_server(adapter, self.scaling))

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        """Return the weighted mean of ``A`` and of ``B``, module by module.

        Raises:
            AggregationError: If an update lacks a module or has another rank than the server's adapter.
        """
        return FedItState(mean_factors(state.adapter, at_one_rank(state.adapter, updates)))

    def aggregate_sum(self, state: FedItState, total: CohortFactors) -> FedItState:
        """Return the same from the sums of the factors of a cohort.

        Raises:
            AggregationError: If clients had another rank than the server's adapter.
        """
        means: dict[str, LoraFactors] = {}
        for module, own in state.adapter.items():
            require_server_ranks({module: own}, dict.fromkeys([module], min(total.weight_by_rank[module])), "a client")
            sums = FactorSums.of_totals(own, total.sums[module], total.weight_by_rank[module])
            means[module] = sums.mean(own, total.weight, "both")
        return FedItState(means)

    def add_noisy_changes(
        self, state: FedItState, changes: Iterable[Change], denominator: float, noise: Noise
    ) -> FedItState:
        """Return the adapter moved by the noisy mean of the changes of the factors."""
        moved = ((change.start, change.update.payload, change.discount) for change in changes)
        return FedItState(with_noisy_changes(state.adapter, moved, denominator, noise))

    def broadcast(self, state: FedItState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the averaged adapter in float32; ``ranks`` must be the server's.

        Raises:
            AggregationError: If they are not.
        """
        return Broadcast(whole(state.adapter, ranks))

    def spectra(self, state: FedItState) -> dict[str, Spectrum]:
        """Return the decomposed product of the averaged factors; nothing of it was discarded."""
        return {module: spectrum_of(factors) for module, factors in state.adapter.items()}
