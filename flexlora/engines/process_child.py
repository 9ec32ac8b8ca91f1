"""The child's side of ``workers``: trains chunks for the process that started it, and ends when that does.

Started as ``python -m flexlora.engines.process_child SOCKET MEMORY``, two inherited file descriptors. It gets one
``Start`` and then ``Task`` after ``Task``, each pickled: they come from the process that started it, over a socket
that nobody else has. It answers ``READY`` to the start; to a task ``READY`` when it begins, then each client's outcome.
"""

import dataclasses
import os
import pickle
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.shared_model import attach
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import ClientFailure, Update
from flexlora.lora.factors import LoraFactors
from flexlora.training.adapted_model import AdaptedModel
from flexlora.uplink.wire import decode_broadcast

READY = b"ready"


# What a worker has of its own, instead of what the engine of the starting process has.
_OWN_FIELDS = ("model", "examples_of")


@dataclass(frozen=True)
class Start:
    """What a worker needs once.

    Attributes:
        description: Of the shared model.
        device: Where to train.
        num_threads: CPU threads of tensor work.
        deterministic: Whether kernels have to add in a fixed order.
        matmul_precision: As torch names it.
    """

    description: bytes
    device: str
    num_threads: int
    deterministic: bool
    matmul_precision: str


@dataclass(frozen=True)
class Task:
    """A chunk to train.

    Attributes:
        call: Number of the call of ``train`` it belongs to; packets of another are of no more use.
        clients: Who trains.
        examples: Client id -> training examples.
        packets: Encoded broadcasts of those plans that the worker has not got in this call.
        order: What ``pickled_order`` returned.
        engine: What ``pickled_settings`` returned.
    """

    call: int
    clients: Sequence[ClientSpec]
    examples: Mapping[str, Sequence[EncodedExample]]
    packets: Mapping[RankPlan, bytes]
    order: bytes
    engine: bytes


def pickled_settings(engine: SimulationEngine) -> bytes:
    """Return everything that makes ``engine`` train as it does, but for the model and the data."""
    names = [field.name for field in dataclasses.fields(engine) if field.name not in _OWN_FIELDS]
    return pickle.dumps({name: getattr(engine, name) for name in names})


def pickled_order(order: RoundOrder) -> bytes:
    """Return an order without clients and parcels, which follow chunk by chunk."""
    return pickle.dumps(dataclasses.replace(order, cohort=(), parcels={}))


def packed(outcome: Update | ClientFailure) -> bytes:
    """Return an outcome as bytes, its factors in the type in which they have travelled from the client."""
    if isinstance(outcome, ClientFailure):
        return pickle.dumps((outcome, None))
    # As integers of the same width, because not every type has a counterpart in numpy, whose arrays pickle quickly.
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


class Trainer:
    """Trains tasks on one model; what belongs to a call of ``train`` is kept until the next one."""

    def __init__(self, model: AdaptedModel) -> None:
        self._model = model
        self._task: Task | None = None
        self._engine: SimulationEngine | None = None
        self._parcels: dict[RankPlan, Parcel] = {}

    def take(self, task: Task) -> tuple[SimulationEngine, RoundOrder]:
        """Return the engine of a task, made ready for it, and the order for its clients."""
        if self._task is None or self._task.call != task.call:
            self._parcels.clear()
        if self._engine is None or self._task is None or self._task.engine != task.engine:
            self._engine = SimulationEngine(
                model=self._model,
                examples_of=self._examples_of,
                **pickle.loads(task.engine),
            )
        order: RoundOrder = pickle.loads(task.order)
        for plan, packet in task.packets.items():
            self._parcels[plan] = Parcel(decode_broadcast(packet), order.wire_dtype, packet)
        self._task = task
        return self._engine, dataclasses.replace(order, cohort=task.clients, parcels=self._parcels)

    def _examples_of(self, client_id: str) -> Sequence[EncodedExample]:
        assert self._task is not None
        return self._task.examples[client_id]


def main() -> None:
    """Serve the process that has started this one until it closes the socket."""
    # An interruption from the keyboard reaches both: the other process decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, inbox = Connection(int(sys.argv[1])), SimpleQueue[bytes]()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    start: Start = pickle.loads(inbox.get())
    torch.set_num_threads(start.num_threads)
    torch.set_float32_matmul_precision(start.matmul_precision)
    torch.use_deterministic_algorithms(start.deterministic, warn_only=True)
    trainer = Trainer(attach(int(sys.argv[2]), start.description, start.device))
    connection.send_bytes(READY)
    while True:
        task: Task = pickle.loads(inbox.get())
        engine, order = trainer.take(task)
        connection.send_bytes(READY)
        for outcome in engine.train(order):
            connection.send_bytes(packed(outcome))


def _listen(connection: Connection, inbox: "SimpleQueue[bytes]") -> None:
    """Take messages as they come, and end this process when there is nobody left who could send one."""
    try:
        while True:
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    main()
