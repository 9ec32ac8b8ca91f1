"""Aligned FlexLoRA: average factors in the coordinates of one decomposition, then decompose again.

The server holds ``G = B0 A0``, its factors made from one decomposition ``U diag(sigma) Vh`` (fresh rows included). A
client of rank ``r`` starts from the first ``r`` directions, so all factors of a round share coordinates. With ``dA_i``
and ``dB_i`` the changes of ``A_i`` and of ``s_i B_i``, ``w_i = n_i / sum n`` and ``c_j = sum_{r_i >= j} w_i``:

    A+[j] = A0[j] + sum_{r_i >= j} w_i dA_i[j] / c_j^e,     B+[:, j] likewise,     G+ = B+ A+ = U diag(sigma) Vh

and, unless ``fold_tail`` is off, each client also gets the directions above its rank as a branch it does not train, so
that it computes its gradient at ``G``. Ours; the redistribution is that of FlexLoRA (arXiv:2402.11505).

Compared with the mean of products:

- ``B+ A+`` has at most the server's rank: nothing is truncated, and clients that echo change nothing.
- The mean of products holds ``mean(dB_i dA_i)``, noise of second order in the learning rate that every client adds on
  its own; here it is ``mean(dB_i) mean(dA_i)``, in which it averages out.
- Plain sums of factors and the weight that holds each direction are all the server needs of the clients.

``holder_exponent`` is ``e``: with 1 a direction moves by the mean of those who hold it, with 0 by their share of the
mean of all, slower but steadier where few devices are large.

It is not invariant under ``(B M, M^-1 A)`` of a single client: clients must return the coordinates they were sent. Late
updates are not taken: they were trained in the coordinates of an earlier round.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flexlora.aggregators.base import Noise
from flexlora.aggregators.nested import first_directions, folded, payloads_of, spectra_of, within_server_ranks
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.messages import Broadcast, Change, CohortFactors, Update
from flexlora.lora.direction_mean import mean_directions, moved_directions, with_noisy_changes
from flexlora.lora.factor_mean import FactorSums
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


@dataclass(frozen=True)
class AlignedState:
    """The server's factors.

    Attributes:
        factors: ``A0`` and ``B0`` per module at the server's rank, float64, scaling 1: ``B0`` carries it.
        initial_rows: The initial ``A``, which gives directions without a singular value their rows.
        rounds: Rounds aggregated so far.
    """

    factors: Mapping[str, LoraFactors]
    initial_rows: Mapping[str, Tensor]
    rounds: int = 0


@aggregation_method("aligned")
@dataclass(frozen=True)
class Aligned:
    """Means of factors in the coordinates of one decomposition, decomposed again (aligned FlexLoRA).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    holder_exponent: float = option(
        0.0,
        "Power of a direction's coverage that its mean change is divided by: 1 is the mean of those who hold it, 0 "
        "their share of the mean of all clients.",
        ge=0.0,
        le=1.0,
    )
    fold_tail: bool = option(True, "Send each client the directions above its rank too, as a branch it does not train.")
    split: Literal["b", "balanced"] = option(
        "b", "Where singular values go: all into B (as FlexLoRA), or their roots into A and B."
    )
    decompose_every: int | None = option(
        1, "Rounds between decompositions; null never decomposes and keeps the first coordinates.", ge=1
    )
    server_learning_rate: float = option(1.0, "What the mean change of the factors is multiplied by.", gt=0.0)

    @property
    def traits(self) -> Traits:
        """What others must know of this method."""
        return Traits(
            folds_tail=self.fold_tail,
            server_optimizer=self.server_learning_rate != 1.0,
            secure_sums="factors",
            private_changes="factors" if self.holder_exponent == 0.0 else None,
        )

    def init(self, adapter: AdapterState) -> AlignedState:
        """Return the initial adapter as the server's factors."""
        own = folded(adapter)
        return AlignedState(own, {module: factors.A.clone() for module, factors in own.items()})

    def aggregate(self, state: AlignedState, updates: Iterable[Update]) -> AlignedState:
        """Return the factors moved by the mean changes, decomposed again where that is due.

        Raises:
            AggregationError: If an update has a larger rank than the server's factors.
        """
        payloads = payloads_of(within_server_ranks(state.factors, updates))
        moved = mean_directions(state.factors, payloads, self.holder_exponent, self.server_learning_rate)
        return self._decomposed(state, moved)

    def aggregate_sum(self, state: AlignedState, total: CohortFactors) -> AlignedState:
        """Return the same from the sums of the factors of a cohort and the weight that holds each direction."""
        sums = {
            module: FactorSums.of_totals(own, total.sums[module], total.weight_by_rank[module])
            for module, own in state.factors.items()
        }
        moved = moved_directions(state.factors, sums, total.weight, self.holder_exponent, self.server_learning_rate)
        return self._decomposed(state, moved)

    def add_noisy_changes(
        self, state: AlignedState, changes: Iterable[Change], denominator: float, noise: Noise
    ) -> AlignedState:
        """Return the factors moved by the noisy mean of the changes, decomposed again where that is due.

        All directions of the server get noise, held by anyone or not. Only with ``holder_exponent`` 0: dividing by the
        weight of those who hold a direction would make what one client does depend on who else takes part.
        """
        moved = ((change.start, change.update.payload, change.discount) for change in changes)
        return self._decomposed(
            state, with_noisy_changes(state.factors, moved, denominator, noise, self.server_learning_rate)
        )

    def _decomposed(self, state: AlignedState, moved: dict[str, LoraFactors]) -> AlignedState:
        """Return the moved factors as the next state, decomposed again where that is due."""
        rounds = state.rounds + 1
        if self.decompose_every is not None and rounds % self.decompose_every == 0:
            moved = {module: self._in_new_coordinates(moved[module], state.initial_rows[module]) for module in moved}
        return AlignedState(moved, state.initial_rows, rounds)

    def broadcast(self, state: AlignedState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the first directions in float32 and, under ``fold_tail``, the others as the frozen branch.

        Raises:
            AggregationError: If a rank exceeds the server's.
        """
        trainable = first_directions(state.factors, ranks, self.scaling)
        return Broadcast(trainable, _tails(state.factors, ranks) if self.fold_tail else None)

    def spectra(self, state: AlignedState) -> dict[str, Spectrum]:
        """Return the decomposed product of the server's factors; nothing of it was discarded."""
        return spectra_of(state.factors)

    def _in_new_coordinates(self, factors: LoraFactors, initial_rows: Tensor) -> LoraFactors:
        """Return the same change in the coordinates of its decomposition, at the same rank."""
        spectrum = spectrum_of(factors, factors.rank)
        return spectrum.factors(factors.rank, 1.0, self.split, initial_rows).to(torch.float64)


def _tails(factors: AdapterState, ranks: Mapping[str, int]) -> dict[str, LoraFactors] | None:
    """Return the directions from each rank on that carry anything, or None if there are none."""
    tails: dict[str, LoraFactors] = {}
    for module, own in factors.items():
        rank = ranks.get(module, 0)
        is_used = own.B[:, rank:].any(dim=0)
        if is_used.any():
            tails[module] = LoraFactors(own.A[rank:][is_used], own.B[:, rank:][:, is_used], 1.0).to(torch.float32)
    return tails or None
