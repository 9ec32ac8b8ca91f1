"""FlexLoRA: average the products, decompose once, hand each client the best approximation of its rank.

With ``P_i = s_i B_i A_i``, ``w_i = n_i / sum n`` and ``T_r`` the best approximation of rank ``r`` (arXiv:2402.11505):

    G+ = sum_i w_i P_i = U diag(sigma) Vh,        client i receives T_{r_i}(G+)

Scalings multiply on arrival and divide on dispatch, inside ``flexlora.lora``. A module that a client lacks is a zero
product; its weight counts.

If clients return what they got, ``sigma_j`` is multiplied by its coverage ``c_j = sum_{i: r_i >= j} w_i`` each round,
and what only large ranks can hold dies out. Two independent switches, both off in the paper:

``error_compensation`` adds back what the participants of this round could not hold (ranks read off the payloads):

    G+ = sum_i w_i P_i + U diag((1 - c_j) sigma_j) Vh = G + sum_i w_i (P_i - T_{r_i}(G))

Every client contributes its change against what it was sent. Without training ``G+ = G``; a module that nobody brought
stays.

``fold_tail`` sends ``F_i = G - T_{r_i}(G)`` along as a frozen branch, so that the client computes its gradient at
``G``. It returns only the trained branch, so ``P_i`` means the same as without it, and the server's rule stays:

- with ``error_compensation``, ``sum_i w_i (P_i + F_i)`` is the very formula above: ``G+`` is the mean of the models the
  clients really ran, and both sides agree. This is the combination to use.
- alone, ``G+ = sum_i w_i P_i`` drops the ``F_i`` that the clients trained against; without training it decays by
  ``c_j`` as the paper's method does. It is there to tell the effects of the two switches apart.

Late updates (``clock.policy: async``) count by their change against what their client was sent, ``v_i`` being the
version that was, ``t_i`` its staleness and ``d`` the discount:

    G+ = G + sum_i w_i d(t_i) (P_i - T_{r_i}(G_{v_i}))

Without staleness that is error compensation. A discount shortens the step; the weights are not scaled up again.

``server_learning_rate`` and ``server_momentum`` take ``G+`` of either rule as the goal of a step from ``G``
(``flexlora.lora.server_step``). At 1 and 0, the paper's, the goal is reached and nothing is remembered. With
``error_compensation``, a learning rate ``eta`` and no momentum:

    G+ = U diag((1 - eta c_j) sigma_j) Vh + eta sum_i w_i P_i

``energy`` hands a client no more directions than the spectrum of a module calls for, which saves bytes both ways:

    r = min(r_i, p + spare),    p = min {p: sum_{j <= p} sigma_j^2 >= energy sum_j sigma_j^2}

Coverage, error compensation and the folded tail go by ``r``, the directions that were really sent. The ``spare`` ones
(the next of ``G``, fresh rows after its last) let a module grow: without them, clients that agree could never fill more
directions than they were handed.

Before anything has been learned ``G`` has no directions and each client receives the first rows of the initial ``A``
and a zero ``B``: round 1 starts as standard LoRA does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flexlora.aggregators.base import AggregationError, Noise, weighed
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import OptionError, Traits, option
from flexlora.federation.messages import Broadcast, Change, CohortProducts, Update
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.global_change import branch_factors
from flexlora.lora.product import (
    ProductSum,
    Spectrum,
    add_dense,
    add_product,
    add_spectrum,
    spectrum_of,
)
from flexlora.lora.server_step import ServerOptimizer, server_step
from flexlora.lora.spectrum import directions_holding


@dataclass(frozen=True)
class FlexLoraState:
    """The aggregate of each module.

    Attributes:
        spectra: ``G`` per module, float64, scaling included.
        initial_rows: The initial ``A``, which gives clients fresh rows where ``G`` has no direction.
        max_ranks: Number of directions kept per module.
        momentum: ``M`` per module under ``server_momentum``, its ``tail`` being what the last round cut off; None
            before the first round and without momentum.
    """

    spectra: Mapping[str, Spectrum]
    initial_rows: Mapping[str, Tensor]
    max_ranks: Mapping[str, int]
    momentum: Mapping[str, Spectrum] | None = None


@aggregation_method("flexlora")
@dataclass(frozen=True)
class FlexLora:
    """Mean of products, one SVD per module, best approximation per client (arXiv:2402.11505).

    Attributes:
        scaling: The scaling rule of the clients.
        server_rank: With None, as many directions as the initial adapter has or any update ever brought, which loses
            nothing that could be dispatched.
        most_directions: What a bounded sum loses is added to ``tail`` of the spectra.
    """

    scaling: Scaling
    server_rank: int | None = option(
        None, "Directions the server keeps per module; null is the largest rank of any client type.", ge=1
    )
    split: Literal["b", "balanced"] = option(
        "b", "Where singular values go: all into B (the paper's code), or their roots into A and B."
    )
    error_compensation: bool = option(
        False, "Add back what truncation hid from low-rank clients, so that high directions do not decay."
    )
    fold_tail: bool = option(
        False, "Send each client the directions above its rank too, as a branch it does not train."
    )
    accuracy: Literal["exact", "fast"] = option(
        "exact", "How near the decomposition is to the best one of its rank: within 1e-6 or 1e-3 of its error."
    )
    most_directions: int | None = option(
        None, "Directions a round's sum holds per module while updates arrive, to bound memory; null is all.", ge=1
    )
    server_learning_rate: float = option(
        1.0, "Share of the way to the new aggregate that the server goes each round; 1 is the paper's.", gt=0
    )
    server_momentum: float = option(0.0, "Share of the server's last step that is added to the next.", ge=0, lt=1)
    energy: float | None = option(
        None,
        "Send only the leading directions that hold this share of a module's squared norm; null sends all.",
        gt=0,
        le=1,
    )
    spare_directions: int = option(1, "Directions sent beyond those of `energy`, in which a module can grow.", ge=0)

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            OptionError: Naming both and what to change.
        """
        if self.energy is None and self.spare_directions != 1:
            raise OptionError(
                f"method.spare_directions={self.spare_directions} is ignored without method.energy, which sends all "
                "directions; set method.energy or leave method.spare_directions out"
            )

    @property
    def traits(self) -> Traits:
        """What others must know of this method."""
        return Traits(
            adds_changes=True,
            linear_in_products=True,
            secure_sums="products",
            private_changes="products" if self.most_directions is None else None,
            folds_tail=self.fold_tail,
            server_rank=self.server_rank,
            fewer_directions=self.energy is not None,
            keeps_directions=self.energy in (None, 1.0) and not self.server_momentum,
            server_optimizer=(self.server_learning_rate, self.server_momentum) != (1.0, 0.0),
        )

    def init(self, adapter: AdapterState) -> FlexLoraState:
        """Return the state whose aggregate is the change of ``adapter``, none for PEFT's initial one."""
        modules = sorted(adapter)
        max_ranks = {module: self.server_rank or adapter[module].rank for module in modules}
        return FlexLoraState(
            spectra={module: spectrum_of(adapter[module], max_ranks[module]) for module in modules},
            initial_rows={module: adapter[module].to(torch.float32).A for module in modules},
            max_ranks=max_ranks,
        )

    def aggregate(self, state: FlexLoraState, updates: Iterable[Update]) -> FlexLoraState:
        """Return the decomposed mean of products, with what the round could not hold added back if so configured."""
        total = 0.0
        sums = {
            module: ProductSum(*spectrum.shape, most_directions=self.most_directions)
            for module, spectrum in state.spectra.items()
        }
        weight_by_rank: dict[str, dict[int, float]] = {module: {} for module in sums}
        for update in weighed(sums, updates):
            total += update.weight
            for module, factors in update.payload.items():
                sums[module] = add_product(sums[module], factors, update.weight)
                weights = weight_by_rank[module]
                weights[factors.rank] = weights.get(factors.rank, 0.0) + update.weight
        return self._decomposed(state, self._compensated(state, sums, total, weight_by_rank), total, weight_by_rank)

    def aggregate_sum(self, state: FlexLoraState, total: CohortProducts) -> FlexLoraState:
        """Return the same from the sum of the products of a cohort and the weight of each rank."""
        sums = {
            module: ProductSum(*spectrum.shape, most_directions=self.most_directions)
            for module, spectrum in state.spectra.items()
        }
        for module, product in total.sums.items():
            sums[module] = add_product(sums[module], product, 1.0)
        weights = {module: total.weight_by_rank.get(module, {}) for module in sums}
        return self._decomposed(state, self._compensated(state, sums, total.weight, weights), total.weight, weights)

    def _compensated(
        self,
        state: FlexLoraState,
        sums: Mapping[str, ProductSum],
        total: float,
        weight_by_rank: Mapping[str, Mapping[int, float]],
    ) -> Mapping[str, ProductSum]:
        """Return the sums with what the ranks of a round could not hold added back, if so configured."""
        if not self.error_compensation:
            return sums
        return {
            module: add_spectrum(
                sums[module], spectrum, (total - _covered_weight(weight_by_rank[module], spectrum)) * spectrum.S
            )
            for module, spectrum in state.spectra.items()
        }

    def add_changes(self, state: FlexLoraState, changes: Iterable[Change]) -> FlexLoraState:
        """Return the aggregate with the discounted mean of ``P_i - T_{r_i}(G_{v_i})`` added, decomposed.

        Raises:
            AggregationError: If what a client was sent has other ranks than what it returned.
        """
        sums, ranks, total = self._summed_changes(state, changes)
        return self._decomposed(state, self._around(state, sums, total), total, ranks)

    def add_noisy_changes(
        self, state: FlexLoraState, changes: Iterable[Change], denominator: float, noise: Noise
    ) -> FlexLoraState:
        """Return ``G`` with the noisy mean of ``P_i - T_{r_i}(G)`` added, decomposed.

        The noise is dense and there before the decomposition, which therefore needs no privacy of its own. With and
        without ``error_compensation`` the rule is the same.
        """
        weightless = (replace(change, update=replace(change.update, weight=1.0)) for change in changes)
        sums, ranks, _ = self._summed_changes(state, weightless)
        noisy = {
            module: add_dense(one, noise(module, one.out_features, one.in_features)) for module, one in sums.items()
        }
        return self._decomposed(state, self._around(state, noisy, denominator), denominator, ranks)

    def _around(self, state: FlexLoraState, sums: Mapping[str, ProductSum], total: float) -> dict[str, ProductSum]:
        """Return sums of changes with ``total * G`` added, so that dividing by ``total`` moves ``G`` by their mean."""
        return {module: add_spectrum(sums[module], own, total * own.S) for module, own in state.spectra.items()}

    def _summed_changes(
        self, state: FlexLoraState, changes: Iterable[Change]
    ) -> tuple[dict[str, ProductSum], dict[str, set[int]], float]:
        """Return the discounted sums of ``P_i - T_{r_i}(G_{v_i})``, the ranks that were there, and the whole weight.

        Raises:
            AggregationError: If what a client was sent has other ranks than what it returned.
        """
        total = 0.0
        sums = {
            module: ProductSum(*spectrum.shape, most_directions=self.most_directions)
            for module, spectrum in state.spectra.items()
        }
        ranks: dict[str, set[int]] = {module: set() for module in sums}
        # Clients of one plan and version were sent the same, which is taken off once with all their weight.
        starts: dict[int, tuple[AdapterState, float]] = {}
        for change in changes:
            if _ranks(change.start) != _ranks(change.update.payload):
                raise AggregationError(
                    f"a change needs an update at the ranks that its client was sent, {_ranks(change.start)}; got "
                    f"{_ranks(change.update.payload)} from {change.update.client_id!r}"
                )
            start, sent_weight = starts.get(id(change.start), (change.start, 0.0))
            for update in weighed(sums, [change.update]):
                weight = change.discount * update.weight
                total += update.weight
                for module, factors in update.payload.items():
                    sums[module] = add_product(sums[module], factors, weight)
                    ranks[module].add(factors.rank)
                starts[id(start)] = start, sent_weight + weight
        for start, weight in starts.values():
            for module, factors in start.items():
                sums[module] = add_product(sums[module], factors, -weight)
        return sums, ranks, total

    def _decomposed(
        self,
        state: FlexLoraState,
        sums: Mapping[str, ProductSum],
        total: float,
        ranks: Mapping[str, Iterable[int]],
    ) -> FlexLoraState:
        """Return the state of ``sums / total``; ``ranks`` are those that a round brought, module by module."""
        max_ranks = {module: self.server_rank or max([state.max_ranks[module], *ranks[module]]) for module in sums}
        optimizer = ServerOptimizer(self.server_learning_rate, self.server_momentum, self.accuracy)
        spectra, momentum = server_step(optimizer, state.spectra, state.momentum, sums, total, max_ranks)
        return FlexLoraState(spectra, state.initial_rows, max_ranks, momentum)

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return ``T_r(G)`` per module in float32 and, under ``fold_tail``, the rest as the frozen branch.

        ``r`` is the rank asked for or, under ``energy``, what the module needs of it; the scaling is that of ``r``. The
        frozen branch also covers modules that the client lacks, where the rest is all of ``G``.
        """
        sent = {module: self._num_directions(state.spectra[module], rank) for module, rank in sorted(ranks.items())}
        trainable = {
            module: state.spectra[module]
            .factors(rank, self.scaling(rank), self.split, state.initial_rows[module])
            .to(torch.float32)
            for module, rank in sent.items()
        }
        if not self.fold_tail:
            return Broadcast(trainable)
        rest = {module: spectrum.below(sent.get(module, 0)) for module, spectrum in state.spectra.items()}
        return Broadcast(trainable, branch_factors(rest))

    def _num_directions(self, spectrum: Spectrum, rank: int) -> int:
        """Return how many directions of a module a client of this rank is sent; all while nothing has been learned."""
        needed = 0 if self.energy is None else directions_holding(spectrum, self.energy)
        return rank if needed == 0 else min(rank, needed + self.spare_directions)

    def spectra(self, state: FlexLoraState) -> Mapping[str, Spectrum]:
        """Return ``G`` per module as it is kept, with the norm of what the server's rank cut off in this round."""
        return state.spectra


def _ranks(adapter: AdapterState) -> dict[str, int]:
    return {module: factors.rank for module, factors in adapter.items()}


def _covered_weight(weight_by_rank: Mapping[int, float], spectrum: Spectrum) -> Tensor:
    """Return, for each direction of ``spectrum``, the weight of the clients whose rank reaches it."""
    directions = torch.arange(spectrum.S.shape[0], device=spectrum.S.device)
    covered = torch.zeros_like(spectrum.S)
    for rank, weight in sorted(weight_by_rank.items()):
        covered += weight * (directions < rank)
    return covered
