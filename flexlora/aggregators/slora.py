"""SLoRA: some rounds of sparse fine-tuning of the whole weights, whose decomposition is where LoRA then starts.

With one random mask that all clients share, ``D_i`` the sparse change of client ``i``, ``w_i = n_i / sum n``
(arXiv:2308.06522):

    stage 1, rounds 1 to R_1:   D+ = sum_i w_i D_i                     exact: the entries are the same for everyone
    after round R_1:            D = U diag(S) Vh,   B = U_r diag(S_r) / s,   A = Vh_r,   weights back to W0
    stage 2:                    FedIT (the paper's, one rank) or FlexLoRA (mixed ranks; arXiv:2402.11505), unchanged

A sparse change is a ``B`` under a mask over an identity ``A`` of rank ``in_features``, with scaling 1. The identity
need not be sent, and of ``B`` only the chosen entries are; the mask is drawn from a seed. A client that lacks a module
counts as zero there, as in FlexLoRA; a module that nobody has stays.

Known flaws: training in stage 1 needs the gradient of every whole weight, however few entries are kept; what the
server's rank cannot hold of ``D`` is lost; clients of small ranks send as much in stage 1 as those of large ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from flexlora.aggregators.base import AggregationError, require_server_ranks, weighed
from flexlora.aggregators.direction_choice import seed_of
from flexlora.aggregators.fedit import FedIt, FedItState
from flexlora.aggregators.flexlora import FlexLora, FlexLoraState
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option
from flexlora.federation.known_rows import known_rows, mask_of
from flexlora.federation.messages import Broadcast, SparseMask, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.lora.product import Spectrum, spectrum_of


@dataclass(frozen=True)
class SLoraState:
    """The sparse change in stage 1, the state of another method in stage 2.

    Attributes:
        num_rounds: How many rounds have been aggregated.
        seed: Of the mask.
        initial: The initial adapter, for shapes, ranks and fresh rows; empty in stage 2.
        values: Module -> the chosen entries of the sparse change, row by row, float64; empty in stage 2.
        second: None in stage 1.
        lost: Module -> norm of what the server's rank could not hold, after the last round of stage 1; else empty.
    """

    num_rounds: int
    seed: int
    initial: Mapping[str, LoraFactors]
    values: Mapping[str, Tensor]
    second: FedItState | FlexLoraState | None = None
    lost: Mapping[str, float] = field(default_factory=dict[str, float])


@aggregation_method("slora")
@dataclass(frozen=True)
class SLora:
    """A sparse stage under a shared mask, its SVD as the start of LoRA (arXiv:2308.06522).

    Attributes:
        scaling: The scaling rule of the clients.
    """

    scaling: Scaling
    sparse_rounds: int = option(5, "Rounds of sparse fine-tuning before LoRA starts (R_1).", ge=1)
    density: float | None = option(
        None, "Share of adapted weights trained in stage 1; null is as many as LoRA at the server's rank.", gt=0, le=1
    )
    stage_two: Literal["fedit", "flexlora"] = option(
        "fedit", "Method of stage 2: fedit (the paper's, one rank for all) or flexlora (mixed ranks)."
    )

    @property
    def traits(self) -> Traits:
        """What others must know of this method."""
        return Traits(
            needs_one_rank=self.stage_two == "fedit",
            sends_both_factors=False,
            takes_own_training=False,
            least_rounds=self.sparse_rounds + 1,
        )

    def init(self, adapter: AdapterState) -> SLoraState:
        """Return the state before stage 1: no change yet."""
        initial = {module: adapter[module].to(torch.float64) for module in sorted(adapter)}
        mask = self._mask(initial, seed := seed_of(adapter))
        values = {
            module: torch.zeros(int(mask_of(mask, module, factors.shape).sum()), dtype=torch.float64)
            for module, factors in initial.items()
        }
        return SLoraState(0, seed, initial, values)

    def aggregate(self, state: SLoraState, updates: Iterable[Update]) -> SLoraState:
        """Return the mean of the sparse changes, decomposed after the last round of stage 1; or stage 2's next state.

        Raises:
            AggregationError: If an update of stage 1 is no change of whole weights, or as stage 2's method says.
        """
        num_rounds = state.num_rounds + 1
        if state.second is not None:
            if isinstance(state.second, FedItState):
                second = FedIt(self.scaling).aggregate(state.second, updates)
            else:
                second = FlexLora(self.scaling).aggregate(state.second, updates)
            return SLoraState(num_rounds, state.seed, {}, {}, second)
        values = self._mean_values(state, updates)
        after = SLoraState(num_rounds, state.seed, state.initial, values)
        if num_rounds < self.sparse_rounds:
            return after
        spectra = {module: self._spectrum(after, module, own.rank) for module, own in state.initial.items()}
        start = {
            module: spectra[module].factors(own.rank, self.scaling(own.rank), spare=own.A)
            for module, own in state.initial.items()
        }
        lost = {module: spectrum.tail for module, spectrum in spectra.items()}
        second = FedIt(self.scaling).init(start) if self.stage_two == "fedit" else FlexLora(self.scaling).init(start)
        return SLoraState(num_rounds, state.seed, {}, {}, second, lost)

    def broadcast(self, state: SLoraState, ranks: Mapping[str, int]) -> Broadcast:
        """Return the sparse change over an identity, which everyone trains alike; in stage 2, what its method sends.

        Raises:
            AggregationError: If stage 2 needs one rank and ``ranks`` are not the server's.
        """
        if isinstance(state.second, FedItState):
            return FedIt(self.scaling).broadcast(state.second, ranks)
        if state.second is not None:
            return FlexLora(self.scaling).broadcast(state.second, ranks)
        if self.traits.needs_one_rank:
            require_server_ranks(state.initial, ranks, "the receiving client")
        mask = self._mask(state.initial, state.seed)
        trainable: dict[str, LoraFactors] = {}
        for module in sorted(ranks):
            in_features = state.initial[module].shape[1]
            identity = known_rows("identity", module, in_features, in_features)
            trainable[module] = LoraFactors(identity, self._dense(state, module).to(torch.float32), 1.0)
        return Broadcast(trainable, train_factors="B", known_A="identity", mask=mask)

    def spectra(self, state: SLoraState) -> Mapping[str, Spectrum]:
        """Return the decomposed change; all its directions in stage 1, those of the server's rank in stage 2."""
        if state.second is None:
            return {module: self._spectrum(state, module) for module in state.initial}
        if isinstance(state.second, FedItState):
            spectra: Mapping[str, Spectrum] = FedIt(self.scaling).spectra(state.second)
        else:
            spectra = FlexLora(self.scaling).spectra(state.second)
        return {module: replace(own, tail=state.lost.get(module, own.tail)) for module, own in spectra.items()}

    def _mean_values(self, state: SLoraState, updates: Iterable[Update]) -> dict[str, Tensor]:
        """Return the weighted mean of the chosen entries; a module that an update lacks counts as zero."""
        mask = self._mask(state.initial, state.seed)
        masks = {module: mask_of(mask, module, factors.shape) for module, factors in state.initial.items()}
        sums = {module: torch.zeros_like(values) for module, values in state.values.items()}
        total, brought = 0.0, set[str]()
        for update in weighed(state.initial, updates):
            if self.traits.needs_one_rank:
                held = {module: state.initial[module].rank for module in update.payload}
                require_server_ranks(state.initial, held, f"client {update.client_id!r}")
            total += update.weight
            for module, factors in update.payload.items():
                if factors.B.shape != masks[module].shape:
                    raise AggregationError(
                        f"stage 1 needs a change of the whole weight of {module!r}, {tuple(masks[module].shape)}; got "
                        f"{tuple(factors.B.shape)} from {update.client_id!r}"
                    )
                change = factors.with_scaling(1.0).B.detach()[masks[module]]
                sums[module] += update.weight * change.to(torch.float64)
                brought.add(module)
        return {
            module: sums[module] / total if module in brought else values for module, values in state.values.items()
        }

    def _spectrum(self, state: SLoraState, module: str, max_rank: int | None = None) -> Spectrum:
        dense = self._dense(state, module)
        return spectrum_of(LoraFactors(torch.eye(dense.shape[1], dtype=dense.dtype), dense, 1.0), max_rank)

    def _dense(self, state: SLoraState, module: str) -> Tensor:
        """Return the sparse change of a module with its zeros, ``[out_features, in_features]``, float64."""
        chosen = mask_of(self._mask(state.initial, state.seed), module, state.initial[module].shape)
        dense = torch.zeros(chosen.shape, dtype=torch.float64)
        dense[chosen] = state.values[module]
        return dense

    def _mask(self, initial: AdapterState, seed: int) -> SparseMask:
        """Return the mask that all clients share, in every round of stage 1."""
        if self.density is not None:
            return SparseMask(self.density, seed)
        in_lora = sum(factors.A.numel() + factors.B.numel() for factors in initial.values())
        in_weights = sum(factors.shape[0] * factors.shape[1] for factors in initial.values())
        return SparseMask(min(1.0, in_lora / in_weights), seed)
