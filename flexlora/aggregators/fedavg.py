"""FedAvg: the mean of ``A`` and the mean of ``B``, clients trained by SGD (arXiv:1602.05629).

``A+ = sum_i w_i A_i``, ``B+ = sum_i w_i B_i`` with ``w_i = n_i / sum n``: on the server it is ``fedit``, with the same
flaw, that the product of the means is not the mean of the products. What differs is the clients' optimiser.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora.aggregators.fedit import FedIt, FedItState
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits
from flexlora.federation.messages import Broadcast, CohortFactors, Update
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.product import Spectrum


@aggregation_method("fedavg")
@dataclass(frozen=True)
class FedAvg:
    """Weighted average of the factors at one rank, after local SGD (arXiv:1602.05629).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    traits = Traits(needs_one_rank=True, local_optimizer="sgd", secure_sums="factors")

    def init(self, adapter: AdapterState) -> FedItState:
        """Return the initial adapter, its scalings taken over by the rule."""
        return FedIt(self.scaling).init(adapter)

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        """Return the weighted mean of ``A`` and of ``B``, module by module.

        Raises:
            AggregationError: If an update lacks a module or has another rank than the server's adapter.
        """
        return FedIt(self.scaling).aggregate(state, updates)

    def aggregate_sum(self, state: FedItState, total: CohortFactors) -> FedItState:
        """Return the same from the sums of the factors of a cohort.

        Raises:
            AggregationError: If clients had another rank than the server's adapter.
        """
        return FedIt(self.scaling).aggregate_sum(state, total)

    def broadcast(self, state: FedItState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the averaged adapter in float32; ``ranks`` must be the server's.

        Raises:
            AggregationError: If they are not.
        """
        return FedIt(self.scaling).broadcast(state, ranks)

    def spectra(self, state: FedItState) -> dict[str, Spectrum]:
        """Return the decomposed product of the averaged factors; nothing of it was discarded."""
        return FedIt(self.scaling).spectra(state)
