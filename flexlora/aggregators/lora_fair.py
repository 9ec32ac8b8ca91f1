"""LoRA-FAIR: average the factors, then correct ``B`` so that the product comes near the mean of the products.

With ``w_i = n_i / sum n``, ``Abar = sum_i w_i pad(A_i)``, ``Bbar = sum_i w_i pad(s_i B_i)`` and
``W* = sum_i w_i s_i B_i A_i`` (arXiv:2411.14961):

    A+ = Abar,   B+ = Bbar + dB,   dB = (W* - Bbar Abar) Abar^T (Abar Abar^T + ridge I)^-1

The paper maximises the cosine of ``W*`` and ``(Bbar + dB) Abar`` by gradient steps, with ``ridge ||dB||`` beside it.
Here the Frobenius distance takes the place of the cosine, whose minimum has the closed form above; ``ridge`` is on
another scale than the paper's. A client of rank ``r`` receives ``A+[:r]`` and ``B+[:, :r] / s``.

Known flaws: ``Abar`` limits what can be corrected, since all of ``W*`` that lies outside its rows is lost, and it
depends on how a product is split into factors. Under mixed ranks what clients return unchanged decays by ``c_j`` a
round for a small ridge (``c_j`` being the share of the weight that covers direction ``j``), half as fast in the
exponent as under ``zero_pad``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from flexlora.aggregators.nested import first_directions, folded, spectra_of, within_server_ranks
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import option
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.correction import b_correction
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import ProductSum, Spectrum, add_product


@dataclass(frozen=True)
class LoraFairState:
    """The corrected adapter at the largest rank, in float64, with scaling 1: ``B`` carries it."""

    adapter: Mapping[str, LoraFactors]


@aggregation_method("lora_fair")
@dataclass(frozen=True)
class LoraFair:
    """Mean of the factors with ``B`` corrected towards the mean of the products (arXiv:2411.14961).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    ridge: float = option(0.01, "What holds the correction of B back; 0 corrects as far as A allows (lambda).", ge=0)

    def init(self, adapter: AdapterState) -> LoraFairState:
        """Return the initial adapter, whose ranks are the largest a client may have."""
        return LoraFairState(folded(adapter))

    def aggregate(self, state: LoraFairState, updates: Iterable[Update]) -> LoraFairState:
        """Return the mean of the padded factors, ``B`` corrected in the directions that this round covers.

        Raises:
            AggregationError: If an update has a larger rank than the server's adapter.
        """
        sums = {module: ProductSum(*factors.shape) for module, factors in state.adapter.items()}
        covered, total = dict.fromkeys(sums, 0), 0.0

        def added() -> Iterator[tuple[AdapterState, float]]:
            nonlocal total
            for update in within_server_ranks(state.adapter, updates):
                total += update.weight
                for module, factors in update.payload.items():
                    sums[module] = add_product(sums[module], factors, update.weight)
                    covered[module] = max(covered[module], factors.rank if update.weight > 0 else 0)
                yield update.payload, update.weight

        means = mean_factors(state.adapter, added())
        return LoraFairState(
            {module: self._corrected(mean, sums[module], total, covered[module]) for module, mean in means.items()}
        )

    def broadcast(self, state: LoraFairState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first rows and columns in float32, the client's own scaling divided out of ``B``.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        return Broadcast(first_directions(state.adapter, ranks, self.scaling))

    def spectra(self, state: LoraFairState) -> dict[str, Spectrum]:
        """Return the decomposed product of the corrected factors; nothing of it was discarded."""
        return spectra_of(state.adapter)

    def _corrected(self, mean: LoraFactors, products: ProductSum, total: float, covered: int) -> LoraFactors:
        """Return the mean with the correction added to the first ``covered`` columns of ``B``; the rest is kept."""
        if covered == 0:
            return mean
        dB = b_correction(products, total, mean.truncate(covered), self.ridge)
        B = torch.cat([mean.B[:, :covered] + dB, mean.B[:, covered:]], 1)
        return LoraFactors(mean.A, B, mean.scaling)
