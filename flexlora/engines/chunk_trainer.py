"""Trains chunks at the far end: in a child process or in an actor of a cluster.

Also defines what such a trainer is sent and what it sends back. Everything is pickled, because it passes only between a
process and the trainers that it has started itself.
"""

import dataclasses
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.shared_model import attach
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import ClientFailure, Update
from flexlora.lora.factors import LoraFactors
from flexlora.uplink.wire import decode_broadcast

# Fields of an engine that a trainer fills in itself.
_OWN_FIELDS = ("model", "examples_of")


@dataclass(frozen=True)
class Start:
    """What a trainer needs once.

    Attributes:
        description: Of the shared model.
        device: Where to train.
        num_threads: CPU threads of tensor work.
        deterministic: Whether kernels must add in a fixed order.
        matmul_precision: As torch names it.
    """

    description: bytes
    device: str
    num_threads: int
    deterministic: bool
    matmul_precision: str


@dataclass(frozen=True)
class TrainTask:
    """A chunk to train.

    Attributes:
        call: Number of the call of ``Engine.train``; packets of an earlier call are no longer needed.
        clients: Who trains.
        examples: Client id -> training examples.
        packets: Encoded broadcasts that the trainer still lacks in this call, by rank plan.
        order: What ``pickled_order`` returned.
        engine: What ``pickled_settings`` returned.
    """

    call: int
    clients: Sequence[ClientSpec]
    examples: Mapping[str, Sequence[EncodedExample]]
    packets: Mapping[RankPlan, bytes]
    order: bytes
    engine: bytes


def start_like_here(description: bytes, device: str, num_threads: int) -> Start:
    """Return a start that computes as this process does."""
    return Start(
        description,
        device,
        num_threads,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def pickled_settings(engine: SimulationEngine) -> bytes:
    """Return the fields that make ``engine`` train as it does, except its model and data."""
    names = [field.name for field in dataclasses.fields(engine) if field.name not in _OWN_FIELDS]
    return pickle.dumps({name: getattr(engine, name) for name in names})


def pickled_order(order: RoundOrder) -> bytes:
    """Return an order without clients and parcels, which follow chunk by chunk."""
    return pickle.dumps(dataclasses.replace(order, cohort=(), parcels={}))


def packed(outcome: Update | ClientFailure) -> bytes:
    """Return an outcome as bytes, its factors in the dtype in which they travelled from the client."""
    if isinstance(outcome, ClientFailure):
        return pickle.dumps((outcome, None))
    # As integers of the same width: numpy arrays pickle quickly, but numpy lacks some of the dtypes.
    factors = {
        module: (
            str(one.A.dtype).removeprefix("torch."),
            *(_as_integers(factor) for factor in (one.A, one.B)),
            one.scaling,
        )
        for module, one in outcome.payload.items()
    }
    return pickle.dumps((dataclasses.replace(outcome, payload={}), factors), protocol=5)


def unpacked(data: bytes) -> Update | ClientFailure:
    """Return the outcome that ``packed`` wrote."""
    outcome, factors = pickle.loads(data)
    if factors is None:
        return outcome
    payload: dict[str, LoraFactors] = {}
    for module, (name, A, B, scaling) in factors.items():
        dtype = getattr(torch, name)
        payload[module] = LoraFactors(torch.from_numpy(A).view(dtype), torch.from_numpy(B).view(dtype), scaling)
    return dataclasses.replace(outcome, payload=payload)


def _as_integers(factor: torch.Tensor) -> np.ndarray:
    return factor.view(torch.int16 if factor.element_size() == 2 else torch.int32).numpy()


class ChunkTrainer:
    """Trains tasks on one model; keeps the broadcasts of a call until the first task of another."""

    def __init__(self, memory: int, start: Start) -> None:
        """Set up this process and attach to the model in the file descriptor ``memory``."""
        torch.set_num_threads(start.num_threads)
        torch.set_float32_matmul_precision(start.matmul_precision)
        torch.use_deterministic_algorithms(start.deterministic, warn_only=True)
        self._model = attach(memory, start.description, start.device)
        self._task: TrainTask | None = None
        self._engine: SimulationEngine | None = None
        self._parcels: dict[RankPlan, Parcel] = {}

    def begin(self, task: TrainTask) -> Iterator[bytes]:
        """Prepare a task and return the packed outcomes of its clients, each trained when it is asked for."""
        if self._task is None or self._task.call != task.call:
            self._parcels.clear()
        if self._engine is None or self._task is None or self._task.engine != task.engine:
            self._engine = SimulationEngine(
                model=self._model, examples_of=self._examples_of, **pickle.loads(task.engine)
            )
        order: RoundOrder = pickle.loads(task.order)
        for plan in task.packets.keys() - self._parcels.keys():
            packet = task.packets[plan]
            self._parcels[plan] = Parcel(decode_broadcast(packet), order.wire_dtype, packet)
        self._task = task
        return map(packed, self._engine.train(dataclasses.replace(order, cohort=task.clients, parcels=self._parcels)))

    def _examples_of(self, client_id: str) -> Sequence[EncodedExample]:
        assert self._task is not None
        return self._task.examples[client_id]
