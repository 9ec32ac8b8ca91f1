"""FlexLoRA as others have got it wrong: one mistake each, from public code or near at hand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from flexlora.aggregators.flexlora import FlexLora, FlexLoraState
from flexlora.aggregators.registry import aggregation_method
from flexlora.federation.messages import Broadcast, Change, Update
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import ProductSum, Spectrum, add_spectrum, decompose

ALL_CLIENTS = (1, 2, 4, 5)
"""Ranks of a federation of which only some take part in a round."""


@aggregation_method("root_split")
@dataclass(frozen=True)
class RootSplit(FlexLora):
    """FedLLM-Factory ``flexlora.py`` and an independent Llama-3.2-1B study: ``B = U sqrt(S) / s`` beside ``A = Vh``.

    One root of the singular values is missing, so that the product has ``sqrt(S)`` where ``S`` belongs.
    """

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        rooted = {module: replace(one, S=one.S.sqrt()) for module, one in state.spectra.items()}
        return super().broadcast(replace(state, spectra=rooted), ranks)


@aggregation_method("no_scaling_on_arrival")
@dataclass(frozen=True)
class NoScalingOnArrival(FlexLora):
    """NVFlare's HLoRA example and the first author's Flower strategy: products ``B A`` without ``alpha / r``."""

    def aggregate(self, state: FlexLoraState, updates: Iterable[Update]) -> FlexLoraState:
        return super().aggregate(state, (rescaled(update, lambda factors: 1.0) for update in updates))


@aggregation_method("alpha_sixteen")
@dataclass(frozen=True)
class AlphaSixteen(FlexLora):
    """FederatedScope's ``merge_rate = 16 / rank`` on arrival, the configuration's alpha on dispatch."""

    def aggregate(self, state: FlexLoraState, updates: Iterable[Update]) -> FlexLoraState:
        return super().aggregate(state, (rescaled(update, lambda factors: 16 / factors.rank) for update in updates))


@aggregation_method("untransposed_v")
@dataclass(frozen=True)
class UntransposedV(FlexLora):
    """rb-lora's ``U, S, Vt = torch.svd(BA)``: torch returns ``V``, and its first rows are taken for those of ``Vh``.

    The shapes agree in square modules only, and then the product is wrong.
    """

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        sent = super().broadcast(state, ranks).trainable
        V = {m: torch.linalg.svd(one.delta(), full_matrices=False).Vh.T for m, one in state.spectra.items()}
        return Broadcast({m: LoraFactors(V[m][: f.rank].float(), f.B, f.scaling) for m, f in sent.items()})


@aggregation_method("transposed_mean")
@dataclass(frozen=True)
class TransposedMean(FlexLora):
    """APPFL's ``federated_lora_svd_aggregator``: decomposes the transpose, so that clients receive that of the mean."""

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        turned = {m: Spectrum(one.Vh.T.contiguous(), one.S, one.U.T.contiguous()) for m, one in state.spectra.items()}
        rows = {module: torch.rand(5, one.shape[1]) for module, one in turned.items()}
        return super().broadcast(FlexLoraState(turned, rows, state.max_ranks), ranks)


@aggregation_method("rank_never_applied")
@dataclass(frozen=True)
class RankNeverApplied(FlexLora):
    """FederatedScope's ``main.py``: what sets a client's rank is called nowhere; all train at ``lora_r``."""

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        return super().broadcast(state, dict.fromkeys(ranks, 5))


@aggregation_method("unlisted_rank_gets_nothing")
@dataclass(frozen=True)
class UnlistedRankGetsNothing(FlexLora):
    """FederatedScope's ``load_weight_local``: a rank that the script does not list is sent nothing, without a word."""

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        return super().broadcast(state, {module: rank for module, rank in ranks.items() if rank in (1, 2, 5)})


@aggregation_method("dead_directions")
@dataclass(frozen=True)
class DeadDirections(FlexLora):
    """NVFlare's HLoRA example: zeros in both factors where the mean has fewer directions than the client."""

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        sent = super().broadcast(state, ranks).trainable
        return Broadcast({m: LoraFactors(f.A * f.B.any(dim=0)[:, None], f.B, f.scaling) for m, f in sent.items()})


@aggregation_method("root_weights")
@dataclass(frozen=True)
class RootWeights(FlexLora):
    """NVFlare's ``L = [sqrt(w) B]``, ``R = [sqrt(w) A]`` carried over to signed changes: a weight below 0 has no root.

    With the root of its size, what a client was sent is added where it has to be taken off.
    """

    def add_changes(self, state: FlexLoraState, changes: Iterable[Change]) -> FlexLoraState:
        negated = [
            replace(c, start={m: LoraFactors(f.A, -f.B, f.scaling) for m, f in c.start.items()}) for c in changes
        ]
        return super().add_changes(state, negated)


@aggregation_method("damped_compensation")
@dataclass(frozen=True)
class DampedCompensation(FlexLora):
    """0.9 of what truncation hid is added back: ranks collapse again, only more slowly."""

    def aggregate(self, state: FlexLoraState, updates: Iterable[Update]) -> FlexLoraState:
        updates = list(updates)
        plain = FlexLora(self.scaling).aggregate(state, updates)
        whole = FlexLora(self.scaling, error_compensation=True).aggregate(state, updates)
        mixed = {m: mixture(whole.spectra[m], 0.9, plain.spectra[m], 0.1, state.max_ranks[m]) for m in state.spectra}
        return replace(whole, spectra=mixed)


@aggregation_method("coverage_of_all_clients")
@dataclass(frozen=True)
class CoverageOfAllClients(FlexLora):
    """Error compensation by the ranks of the federation: right in full rounds, wrong where only some take part."""

    def aggregate(self, state: FlexLoraState, updates: Iterable[Update]) -> FlexLoraState:
        plain = FlexLora(self.scaling).aggregate(state, updates)
        spectra = {}
        for module, old in state.spectra.items():
            covered = sum((torch.arange(len(old.S)) < rank).double() / len(ALL_CLIENTS) for rank in ALL_CLIENTS)
            rest = replace(old, S=(1 - covered) * old.S)
            spectra[module] = mixture(plain.spectra[module], 1.0, rest, 1.0, state.max_ranks[module])
        return replace(plain, spectra=spectra)


@aggregation_method("ascending_values")
@dataclass(frozen=True)
class AscendingValues(FlexLora):
    """The order of ``torch.linalg.eigh``, smallest first: clients are cut to the directions that matter least."""

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        turned = {m: Spectrum(s.U.flip(1), s.S.flip(0), s.Vh.flip(0)) for m, s in state.spectra.items()}
        return super().broadcast(replace(state, spectra=turned), ranks)


@aggregation_method("signs_of_one_side")
@dataclass(frozen=True)
class SignsOfOneSide(FlexLora):
    """Signs made comparable between rounds in ``Vh`` and not in ``U``, so that directions change their sign."""

    def broadcast(self, state: FlexLoraState, ranks: Mapping[str, int]) -> Broadcast:
        spectra = {m: replace(s, Vh=s.Vh * s.Vh[:, :1].sign()) for m, s in state.spectra.items()}
        return super().broadcast(replace(state, spectra=spectra), ranks)


@aggregation_method("uniform_weights")
@dataclass(frozen=True)
class UniformWeights(FlexLora):
    """FSLoRA's FlexLoRA baseline: every client that took part counts alike, whatever its number of examples."""

    def aggregate(self, state: FlexLoraState, updates: Iterable[Update]) -> FlexLoraState:
        return super().aggregate(state, (replace(update, weight=float(update.weight > 0)) for update in updates))


def rescaled(update: Update, scaling) -> Update:
    payload = {m: LoraFactors(f.A, f.B, scaling(f)) for m, f in update.payload.items()}
    return replace(update, payload=payload)


def mixture(one: Spectrum, share: float, other: Spectrum, rest: float, rank: int) -> Spectrum:
    total = add_spectrum(ProductSum(*one.shape), one, share * one.S)
    return decompose(add_spectrum(total, other, rest * other.S), rank)
