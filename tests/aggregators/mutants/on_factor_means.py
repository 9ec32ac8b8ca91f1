"""Means of factors as others have got them wrong: one mistake each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from flexlora.aggregators.dimension_wise import DimensionWise, DimensionWiseState
from flexlora.aggregators.fedit import FedIt, FedItState
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.zero_pad import ZeroPad, ZeroPadState
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import AdapterState, LoraFactors


@aggregation_method("first_client_only")
@dataclass(frozen=True)
class FirstClientOnly(FedIt):
    """FLoRA's FedIT baseline (and FediLoRA's copy): a misspelt name leaves client 0's adapter times its weight."""

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        updates = list(updates)
        share = updates[0].weight / sum(update.weight for update in updates) if updates else 0.0
        first = super().aggregate(state, updates[:1])
        return FedItState({m: LoraFactors(f.A * share, f.B * share, f.scaling) for m, f in first.adapter.items()})


@aggregation_method("sums_in_float32")
@dataclass(frozen=True)
class SumsInFloat32(FedIt):
    """Running sums of bf16 payloads in float32: large changes swallow small ones, in the order in which they come."""

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        return FedItState(running_mean(state.adapter, updates, torch.float32))


@aggregation_method("sums_in_the_type_of_the_payload")
@dataclass(frozen=True)
class SumsInTheTypeOfThePayload(FedIt):
    """Payloads averaged as they arrive: what bf16 rounds away is rounded away at every addition."""

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        updates = list(updates)
        dtype = next((f.A.dtype for update in updates for f in update.payload.values()), torch.float32)
        return FedItState(running_mean(state.adapter, updates, dtype))


@aggregation_method("shared_state")
@dataclass(frozen=True)
class SharedState(FedIt):
    """The server's own tensors are handed out: a client that trains in the same process moves the server."""

    def init(self, adapter: AdapterState) -> FedItState:
        return FedItState({m: f.to(torch.float32) for m, f in super().init(adapter).adapter.items()})

    def aggregate(self, state: FedItState, updates: Iterable[Update]) -> FedItState:
        exact = FedItState({m: f.to(torch.float64) for m, f in state.adapter.items()})
        return FedItState({m: f.to(torch.float32) for m, f in super().aggregate(exact, updates).adapter.items()})

    def broadcast(self, state: FedItState, ranks: Mapping[str, int]) -> Broadcast:
        super().broadcast(state, ranks)
        return Broadcast({module: state.adapter[module] for module in sorted(ranks)})


@aggregation_method("silent_broadcast")
@dataclass(frozen=True)
class SilentBroadcast(ZeroPad):
    """Flower's ``FedAvg``: a client of rank 1 is added to every row, because numpy broadcasts one row to all."""

    def aggregate(self, state: ZeroPadState, updates: Iterable[Update]) -> ZeroPadState:
        return super().aggregate(state, (replace(u, payload=self._spread(state, u.payload)) for u in updates))

    def _spread(self, state: ZeroPadState, payload: AdapterState) -> AdapterState:
        return {
            m: self._over_all_rows(f, state.adapter[m].rank) if f.rank == 1 and m in state.adapter else f
            for m, f in payload.items()
        }

    def _over_all_rows(self, factors: LoraFactors, rank: int) -> LoraFactors:
        return LoraFactors(factors.A.repeat(rank, 1), factors.B.repeat(1, rank), factors.scaling)


@aggregation_method("raw_b")
@dataclass(frozen=True)
class RawB(ZeroPad):
    """FederatedScope's zero padding: ``handle_alpha`` is passed on to nothing, ``B`` averaged without ``alpha / r``."""

    def aggregate(self, state: ZeroPadState, updates: Iterable[Update]) -> ZeroPadState:
        return super().aggregate(state, (replace(update, payload=unscaled(update.payload)) for update in updates))

    def broadcast(self, state: ZeroPadState, ranks: Mapping[str, int]) -> Broadcast:
        sent = super().broadcast(state, ranks).trainable
        return Broadcast({m: LoraFactors(f.A, f.B * f.scaling, f.scaling) for m, f in sent.items()})


@aggregation_method("aggregate_never_loaded")
@dataclass(frozen=True)
class AggregateNeverLoaded(ZeroPad):
    """FederatedScope's HetLoRA baseline: renamed keys match no parameter, and clients keep what they started from."""

    def aggregate(self, state: ZeroPadState, updates: Iterable[Update]) -> ZeroPadState:
        super().aggregate(state, updates)
        return state


@aggregation_method("column_weights_unused")
@dataclass(frozen=True)
class ColumnWeightsUnused(DimensionWise):
    """rb-lora: the weights of columns are computed and never used, so that each is divided by the weight of all."""

    def aggregate(self, state: DimensionWiseState, updates: Iterable[Update]) -> DimensionWiseState:
        super().aggregate(state, updates := list(updates))
        return replace(state, adapter=mean_factors(state.adapter, ((u.payload, u.weight) for u in updates)))


def unscaled(adapter: AdapterState) -> AdapterState:
    return {module: LoraFactors(factors.A, factors.B, 1.0) for module, factors in adapter.items()}


def running_mean(start: AdapterState, updates: Iterable[Update], dtype: torch.dtype) -> dict[str, LoraFactors]:
    """Return the mean of both factors, added up one client after the other in a type."""
    sums = {m: [torch.zeros_like(f.A, dtype=dtype), torch.zeros_like(f.B, dtype=dtype)] for m, f in start.items()}
    total = 0.0
    for update in updates:
        total += update.weight
        for module, factors in update.payload.items():
            sums[module][0] += update.weight * factors.A.detach().to(dtype)
            sums[module][1] += update.weight * factors.B.detach().to(dtype)
    return {m: LoraFactors((A / total).double(), (B / total).double(), start[m].scaling) for m, (A, B) in sums.items()}
