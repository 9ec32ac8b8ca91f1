"""FLoRA, FedEx-LoRA and raFLoRA as others have got them wrong: one mistake each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flexlora.aggregators.fedex_lora import FedExLora, FedExLoraState
from flexlora.aggregators.flora import Flora, FloraState
from flexlora.aggregators.ra_flora import RaFlora, RaFloraState
from flexlora.aggregators.registry import aggregation_method
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import LoraFactors


@aggregation_method("weights_on_both_factors")
@dataclass(frozen=True)
class WeightsOnBothFactors(Flora):
    """``w_i`` on ``A_i`` and on ``B_i``, where FLoRA has it on ``A_i`` alone; a single client hides it."""

    def aggregate(self, state: FloraState, updates: Iterable[Update]) -> FloraState:
        updates = list(updates)
        total = sum(update.weight for update in updates)
        twice = ({m: replace(f, B=f.B * (u.weight / total)) for m, f in u.payload.items()} for u in updates)
        return super().aggregate(state, [replace(u, payload=p) for u, p in zip(updates, twice, strict=True)])


@aggregation_method("stack_at_its_own_scaling")
@dataclass(frozen=True)
class StackAtItsOwnScaling(Flora):
    """FSLoRA's ``LoRA_Stack.py``, or PEFT loading a stack: ``alpha / r`` of the stacked rank, not of the clients'."""

    def aggregate(self, state: FloraState, updates: Iterable[Update]) -> FloraState:
        updates = list(updates)
        ranks: dict[str, int] = {}
        for update in updates:
            for module, factors in update.payload.items():
                ranks[module] = ranks.get(module, 0) + factors.rank
        scaled = ({m: replace(f, scaling=self.scaling(ranks[m])) for m, f in u.payload.items()} for u in updates)
        return super().aggregate(state, [replace(u, payload=p) for u, p in zip(updates, scaled, strict=True)])


@aggregation_method("transposed_residual")
@dataclass(frozen=True)
class TransposedResidual(FedExLora):
    """fedex-lora: the residual is transposed for GPT-2's Conv1D, and for ``nn.Linear`` too; 768 x 768 hides it."""

    def broadcast(self, state: FedExLoraState, ranks: Mapping[str, int]) -> Broadcast:
        sent = super().broadcast(state, ranks)
        frozen = {
            m: LoraFactors(f.B.T.contiguous(), f.A.T.contiguous(), f.scaling) for m, f in (sent.frozen or {}).items()
        }
        return replace(sent, frozen=frozen or None)


@aggregation_method("residual_without_scaling")
@dataclass(frozen=True)
class ResidualWithoutScaling(FedExLora):
    """An independent Llama-3.2-1B study: the residual of FedEx-LoRA lacks ``alpha / r``. One client has no residual."""

    def broadcast(self, state: FedExLoraState, ranks: Mapping[str, int]) -> Broadcast:
        sent = super().broadcast(state, ranks)
        scalings = {module: factors.scaling for module, factors in state.adapter.items()}
        frozen = {m: replace(f, scaling=f.scaling / scalings[m]) for m, f in (sent.frozen or {}).items()}
        return replace(sent, frozen=frozen or None)


@aggregation_method("uncovered_directions_are_lost")
@dataclass(frozen=True)
class UncoveredDirectionsAreLost(RaFlora):
    """A re-implementation of raFLoRA: a partition that nobody of a round reaches is set to zero."""

    def aggregate(self, state: RaFloraState, updates: Iterable[Update]) -> RaFloraState:
        updates = list(updates)
        most = {m: max((u.payload[m].rank for u in updates if m in u.payload), default=0) for m in state.change.spectra}
        cut = {module: spectrum.truncate(most[module]) for module, spectrum in state.change.spectra.items()}
        return super().aggregate(RaFloraState(replace(state.change, spectra=cut)), updates)
