"""FSLoRA and SLoRA as others have got them wrong: one mistake each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flexlora.aggregators.fs_lora import FsLora, FsLoraState
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.slora import SLora, SLoraState
from flexlora.federation.messages import Broadcast, Update


@aggregation_method("sketch_never_applied")
@dataclass(frozen=True)
class SketchNeverApplied(FsLora):
    """Federated-Sketching-LoRA: ``if 'lora_B' == n`` compares with a full parameter name and is never true.

    Nothing is masked, and every client trains all of the server's directions.
    """

    def broadcast_to(self, state: FsLoraState, ranks: Mapping[str, int], client_id: str) -> Broadcast:
        return super().broadcast_to(state, {module: state.adapter[module].rank for module in ranks}, client_id)


@aggregation_method("mask_drawn_again")
@dataclass(frozen=True)
class MaskDrawnAgain(SLora):
    """FlexLoRA's release draws SLoRA's mask in ``get_sparse``, anew at every call: what is kept lies outside of it."""

    def broadcast(self, state: SLoraState, ranks: Mapping[str, int]) -> Broadcast:
        sent = super().broadcast(state, ranks)
        if sent.mask is None:
            return sent
        return replace(sent, mask=replace(sent.mask, seed=sent.mask.seed + state.num_rounds))


@aggregation_method("sparse_stage_lost")
@dataclass(frozen=True)
class SparseStageLost(SLora):
    """FederatedScope with SLoRA and FlexLoRA: aggregation finds no LoRA keys, and the decomposition receives ``{}``."""

    def aggregate(self, state: SLoraState, updates: Iterable[Update]) -> SLoraState:
        after = super().aggregate(state, updates)
        if state.second is not None or after.second is None:
            return after
        nothing = {module: values * 0 for module, values in state.values.items()}
        echo = self.broadcast(replace(state, values=nothing), {m: f.rank for m, f in state.initial.items()})
        return super().aggregate(state, [Update("nobody", echo.trainable, 1.0)])
