"""Trains chunks at the far end: in a child process or in an actor of a cluster.

Also defines what such a trainer is sent and what it sends back. Everything is pickled, because it passes only between a
process and the trainers that it has started itself.
"""

import dataclasses
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Parcel, ParcelKey, RoundOrder
from flexlora.engines.shared_model import attach
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import ClientFailure, KeptFactors, Update
from flexlora.lora.factors import LoraFactors
from flexlora.uplink.wire import decode_broadcast

# Fields of an engine that a trainer fills in itself.
_OWN_FIELDS = ("model", "examples_of")

_REPLACED = "the process that trained this client was replaced, and with it what the client held is lost"


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
        packets: Encoded broadcasts that the trainer still lacks in this call, by whom they are for.
        order: What ``pickled_order`` returned.
        engine: What ``pickled_settings`` returned.
        kept: Client id -> the factor that it kept of an earlier round, where it has one.
    """

    call: int
    clients: Sequence[ClientSpec]
    examples: Mapping[str, Sequence[EncodedExample]]
    packets: Mapping[ParcelKey, bytes]
    order: bytes
    engine: bytes
    kept: Mapping[str, KeptFactors] = field(default_factory=dict)


@dataclass(frozen=True)
class AskTask:
    """Requests of a further phase to clients that this trainer has trained.

    Attributes:
        kind: The phase; None ends the round, and clients drop what they hold.
        requests: Client id -> what it is asked.
    """

    kind: str | None
    requests: Mapping[str, bytes] = field(default_factory=dict)


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
    """Return an order without clients, parcels and what clients kept, which follow chunk by chunk."""
    return pickle.dumps(dataclasses.replace(order, cohort=(), parcels={}, kept={}))


# A tensor as the name of its dtype and its bits.
_Bits = tuple[str, np.ndarray]


def packed(outcome: Update | ClientFailure) -> bytes:
    """Return an outcome as bytes, its factors in the dtype in which they travelled from the client."""
    if isinstance(outcome, ClientFailure):
        return pickle.dumps((outcome, None))
    factors = {module: (_bits(one.A), _bits(one.B), one.scaling) for module, one in outcome.payload.items()}
    others = [None if parts is None else _all_bits(parts) for parts in (outcome.cores, outcome.kept)]
    bare = dataclasses.replace(outcome, payload={}, cores=None, kept=None, packet=None)
    return pickle.dumps((bare, (factors, *others)), protocol=5)


def unpacked(data: bytes) -> Update | ClientFailure:
    """Return the outcome that ``packed`` wrote."""
    outcome, tensors = pickle.loads(data)
    if tensors is None:
        return outcome
    factors, *others = tensors
    payload = {module: LoraFactors(_tensor(A), _tensor(B), scaling) for module, (A, B, scaling) in factors.items()}
    cores, kept = (None if parts is None else {name: _tensor(one) for name, one in parts.items()} for parts in others)
    return dataclasses.replace(outcome, payload=payload, cores=cores, kept=kept)


def _all_bits(parts: Mapping[str, torch.Tensor]) -> dict[str, _Bits]:
    return {module: _bits(part) for module, part in parts.items()}


def _bits(tensor: torch.Tensor) -> _Bits:
    """Return a tensor as integers of the same width: numpy arrays pickle quickly, but numpy lacks some dtypes."""
    bits = tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    return str(tensor.dtype).removeprefix("torch."), bits.numpy()


def _tensor(bits: _Bits) -> torch.Tensor:
    name, values = bits
    return torch.from_numpy(values).view(getattr(torch, name))


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
        self._parcels: dict[ParcelKey, Parcel] = {}

    def answers(self, task: AskTask) -> Iterator[bytes]:
        """Return the pickled replies of the clients of a task, each answered when it is asked for."""
        if task.kind is None:
            if self._engine is not None:
                self._engine.forget()
        elif self._engine is None:
            for client_id, request in task.requests.items():
                yield pickle.dumps(ClientFailure(client_id, task.kind, _REPLACED, len(request)))
        else:
            yield from map(pickle.dumps, self._engine.ask(task.kind, task.requests))

    def begin(self, task: TrainTask) -> Iterator[bytes]:
        """Prepare a task and return the packed outcomes of its clients, each trained when it is asked for."""
        if self._task is None or self._task.call != task.call:
            self._parcels.clear()
        if self._engine is None or self._task is None or self._task.engine != task.engine:
            self._engine = SimulationEngine(
                model=self._model, examples_of=self._examples_of, **pickle.loads(task.engine)
            )
        order: RoundOrder = pickle.loads(task.order)
        # Those of single clients served the chunk before this one.
        self._parcels = {key: parcel for key, parcel in self._parcels.items() if not isinstance(key, str)}
        for key in task.packets.keys() - self._parcels.keys():
            packet = task.packets[key]
            self._parcels[key] = Parcel(decode_broadcast(packet), order.wire_dtype, packet)
        self._task = task
        order = dataclasses.replace(order, cohort=task.clients, parcels=self._parcels, kept=task.kept)
        return map(packed, self._engine.train(order))

    def _examples_of(self, client_id: str) -> Sequence[EncodedExample]:
        assert self._task is not None
        return self._task.examples[client_id]
