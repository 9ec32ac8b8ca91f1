"""FedEx-LoRA: average ``A`` and ``B``, fold what the product of the means misses (arXiv:2410.09432).

With ``w_i = n_i / sum n``, one rank and one scaling ``s`` per module

    A+ = sum_i w_i A_i,  B+ = sum_i w_i B_i,  F+ = F + s (sum_i w_i B_i A_i - B+ A+)

Clients train ``A+`` and ``B+`` and add ``F+``, so that after each round trained and frozen part together are what was
frozen before plus the exact mean of the products. The residual is the weighted covariance of the factors,
``sum_i w_i (B_i - B+)(A_i - A+)``.

The paper takes plain means over the clients (``uniform_weights``), and for a smaller downlink the best approximation of
the residual of each round (Eckart and Young; ``residual_rank``).

The base weights never change here: ``F`` is a frozen branch. The paper's clients remember what was folded and receive
the residual of one round, rank at most ``n r``. Ours remember nothing and receive all of ``F``, each round: its rank
grows with every round and ends at the shorter side of the module. What is sent is what is counted.

Known flaws: the downlink; the whole model does not depend on how a client splits its product into factors, but where
clients train on from does; plain means ignore how much data a client has.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flexlora.aggregators.one_rank import at_one_rank, at_server, whole
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.global_change import adding_products, branch_factors, folded, truncated
from flexlora.lora.product import ProductSum, Spectrum, add_product, add_spectrum, decompose, spectrum_of


@dataclass(frozen=True)
class FedExLoraState:
    """The averaged adapter and what its product misses.

    Attributes:
        adapter: ``A`` and ``B`` per module, float64.
        residual: ``F`` per module, scaling included; its tail is what ``residual_rank`` cut off in the last round.
    """

    adapter: Mapping[str, LoraFactors]
    residual: Mapping[str, Spectrum]


@aggregation_method("fedex_lora")
@dataclass(frozen=True)
class FedExLora:
    """Mean factors, and what their product misses of the mean of products as a frozen branch (arXiv:2410.09432).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    uniform_weights: bool = option(
        False, "Count every client alike, as the paper does, and not by its number of examples."
    )
    residual_rank: int | None = option(
        None, "Directions of each round's residual that are kept per module; null keeps all, which is exact.", ge=1
    )

    @property
    def traits(self) -> Traits:
        """What others must know of this method."""
        return Traits(
            needs_one_rank=True, folds_tail=True, folds_into_base=True, counts_examples=not self.uniform_weights
        )

    def init(self, adapter: AdapterState) -> FedExLoraState:
        """Return the initial adapter, its scalings taken over by the rule, without a residual."""
        start = at_server(adapter, self.scaling)
        return FedExLoraState(start, {module: spectrum_of(factors, 0) for module, factors in start.items()})

    def aggregate(self, state: FedExLoraState, updates: Iterable[Update]) -> FedExLoraState:
        """Return the mean factors, and the residual with what they miss in this round added.

        Raises:
            AggregationError: If an update lacks a module or has another rank than the server's adapter.
        """
        # The stream is read once, by mean_factors; what else is needed of it is noted on the way.
        weights: list[float] = []
        sums = {module: ProductSum(*factors.shape) for module, factors in state.adapter.items()}
        adapter = mean_factors(state.adapter, adding_products(sums, self._noted(state, updates, weights)))
        total = sum(weights)
        missed = {module: add_product(sums[module], mean, -total) for module, mean in adapter.items()}
        if self.residual_rank is None:
            return FedExLoraState(adapter, folded(state.residual, missed, total))
        kept = truncated(missed, dict.fromkeys(missed, self.residual_rank), total)
        steps = {module: add_spectrum(ProductSum(*one.shape), one, one.S) for module, one in kept.items()}
        residual = {
            module: replace(spectrum, tail=kept[module].tail)
            for module, spectrum in folded(state.residual, steps).items()
        }
        return FedExLoraState(adapter, residual)

    def _noted(
        self, state: FedExLoraState, updates: Iterable[Update], weights: list[float]
    ) -> Iterator[tuple[AdapterState, float]]:
        """Yield factors and weight of each update, checked to have the server's ranks, the weight noted."""
        for payload, weight in at_one_rank(state.adapter, updates):
            weights.append(float(weight > 0) if self.uniform_weights else weight)
            yield payload, weights[-1]

    def broadcast(self, state: FedExLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the mean factors in float32, and the residual as the frozen branch; ``ranks`` must be the server's.

        Raises:
            AggregationError: If they are not.
        """
        return Broadcast(whole(state.adapter, ranks), branch_factors(state.residual))

    def spectra(self, state: FedExLoraState) -> dict[str, Spectrum]:
        """Return the whole change, trained and frozen part together, with what the last round cut off."""
        return {
            module: replace(_sum_of(factors, state.residual[module]), tail=state.residual[module].tail)
            for module, factors in state.adapter.items()
        }


def _sum_of(factors: LoraFactors, residual: Spectrum) -> Spectrum:
    """Return the decomposed sum of both parts."""
    return decompose(add_spectrum(add_product(ProductSum(*factors.shape), factors, 1.0), residual, residual.S))
