"""raFLoRA: average each direction over the clients that have it, then decompose (arXiv:2602.13486).

With the sorted ranks of all clients ``0 = b_0 < b_1 < ...`` and ``C_h`` the clients of the round with ``r_k >= b_h``

    G+ = sum_h sum_{k in C_h} (n_k / N_h) s_k B_k[:, b_{h-1}:b_h] A_k[b_{h-1}:b_h],   N_h = sum_{k in C_h} n_k
    G+ = U diag(sigma) Vh,   client of rank r receives A = sqrt(sigma[:r] / s) Vh[:r], B = U[:, :r] sqrt(sigma[:r] / s)

Every client of ``C_h`` has all directions of part ``h``, so the weights are those of each direction on its own,

    G+ = sum_j sum_{k: r_k >= j} (n_k / sum_{r_k >= j} n_k) s_k B_k[:, j] A_k[j]

and the method need not know which ranks there are. Directions that nobody in a round has stay as they were, which the
paper leaves open. A client that lacks a module is in no part of it: its weight does not count there.

At one rank this is FlexLoRA with balanced factors. At mixed ranks it mends FlexLoRA's rank collapse: if clients return
what they got, nothing changes.

Known flaws: direction ``j`` of one client need not be direction ``j`` of another. It is, more or less, because all
start from slices of one decomposition; the more they train, the less. So the result depends on how a client splits its
product into factors, and it is not the mean of the products. The factors of a round are held until its end, because a
direction's divisor is known only then.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.aggregators.base import weighed
from flexlora.aggregators.registry import aggregation_method
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.global_change import GlobalChange, global_change_of, truncated
from flexlora.lora.product import ProductSum, Spectrum, add_product, add_spectrum


@dataclass(frozen=True)
class RaFloraState:
    """The decomposed global adapter.

    Attributes:
        change: ``G`` per module at the server's ranks, and the rows of the initial ``A``.
    """

    change: GlobalChange


@aggregation_method("ra_flora")
@dataclass(frozen=True)
class RaFlora:
    """Products averaged direction by direction over those who have it, decomposed (arXiv:2602.13486).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling

    def init(self, adapter: AdapterState) -> RaFloraState:
        """Return the change of ``adapter``, none for PEFT's initial one."""
        return RaFloraState(global_change_of(adapter))

    def aggregate(self, state: RaFloraState, updates: Iterable[Update]) -> RaFloraState:
        """Return the decomposed mean, its weights chosen direction by direction, cut to the server's ranks."""
        change = state.change
        held: dict[str, list[tuple[LoraFactors, float]]] = {module: [] for module in change.spectra}
        for update in weighed(held, updates):
            for module, factors in update.payload.items():
                if update.weight > 0:
                    held[module].append((factors, update.weight))
        sums = {module: _mean_by_direction(old, held[module]) for module, old in change.spectra.items()}
        return RaFloraState(GlobalChange(truncated(sums, change.server_ranks), change.initial_rows))

    def broadcast(self, state: RaFloraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return ``T_r(G)`` with the roots of the singular values in both factors."""
        return Broadcast(state.change.slices(ranks, self.scaling, "balanced"))

    def spectra(self, state: RaFloraState) -> Mapping[str, Spectrum]:
        """Return ``G`` per module, with the norm of what the server's rank cut off in this round."""
        return state.change.spectra


def _mean_by_direction(old: Spectrum, held: list[tuple[LoraFactors, float]]) -> ProductSum:
    """Return the mean of each direction over the clients that have it, of ``old`` where nobody has."""
    weights = _weight_of_directions(held)
    total = ProductSum(*old.shape)
    for factors, weight in held:
        B = factors.B.detach().to(torch.float64) * (weight / weights[: factors.rank]).to(factors.B.device)
        total = add_product(total, LoraFactors(factors.A, B, factors.scaling), 1.0)
    rest = old.below(weights.shape[0])
    return add_spectrum(total, rest, rest.S)


def _weight_of_directions(held: list[tuple[LoraFactors, float]]) -> Tensor:
    """Return, for each direction up to the largest rank, the weight of the clients that have it, float64."""
    weights = torch.zeros(max((factors.rank for factors, _ in held), default=0), dtype=torch.float64)
    for factors, weight in held:
        weights[: factors.rank] += weight
    return weights
