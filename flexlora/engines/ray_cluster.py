"""Trains a cohort on a Ray cluster, for those who outgrow one machine: actors take chunks of clients as they are free.

Ray itself rather than Flower's simulation, which sends one client's message to an actor at a time: here an actor gets
a chunk, so that its clients share passes, and the broadcast of a rank plan travels to each machine once. The cohort is
cut as for the processes of one machine and trained with the same number of threads, so machines of one kind come to the
same bits. Needs the extra ``flexlora[ray]``.
"""

import itertools
import logging
import os
import pickle
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flexlora.engines.base import RoundOrder
from flexlora.engines.chunks import Chunk, cut_into_chunks
from flexlora.engines.process_child import Start, Task, Trainer, packed, pickled_order, pickled_settings, unpacked
from flexlora.engines.shared_model import attach, share
from flexlora.engines.simulation import SimulationEngine, reason_of
from flexlora.errors import FlexLoraError
from flexlora.federation.clients import RankPlan
from flexlora.federation.messages import ClientFailure, Update
from flexlora.training.adapted_model import AdaptedModel

# Chunks that an actor has or waits for: it never idles while the next one travels.
_CHUNKS_PER_ACTOR = 2

_log = logging.getLogger(__name__)


class RayError(FlexLoraError, RuntimeError):
    """Ray is not installed, cannot be reached, or has not got what actors need."""


@dataclass(frozen=True)
class ActorSettings:
    """What a cluster is asked for.

    Attributes:
        address: Of a running cluster, ``auto`` for the one this machine belongs to, None to start one here.
        num_actors: None is as many as the cluster has room for.
        cpus: Of an actor, which also trains with so many threads.
        gpus: Of an actor; 0 trains on CPUs.
    """

    address: str | None = None
    num_actors: int | None = None
    cpus: int = 1
    gpus: float = 0.0


class Actor:
    """What runs in the cluster: a copy of the base that trains chunks."""

    def __init__(self, memory: np.ndarray, start: Start) -> None:
        """Take the base as ``share`` wrote it."""
        torch.set_num_threads(start.num_threads)
        torch.set_float32_matmul_precision(start.matmul_precision)
        torch.use_deterministic_algorithms(start.deterministic, warn_only=True)
        with tempfile.TemporaryFile() as file:
            file.write(memory.data)
            file.flush()
            self._trainer = Trainer(attach(file.fileno(), start.description, start.device))

    def pid(self) -> int:
        """Return the number of the actor's process."""
        return os.getpid()

    def train(self, task: bytes, plans: Sequence[RankPlan], *packets: bytes) -> list[bytes]:
        """Return the packed outcome of each client of a task."""
        received = pickle.loads(task)
        received = Task(**{**vars(received), "packets": dict(zip(plans, packets, strict=True))})
        engine, order = self._trainer.take(received)
        return [packed(outcome) for outcome in engine.train(order)]


class RayActors:
    """The actors of one model: started when first needed, gone with this object."""

    def __init__(self, model: AdaptedModel, settings: ActorSettings) -> None:
        """Start nothing yet."""
        self._model, self._settings = model, settings
        self._actors: list[Any] = []
        self._make: Callable[[], Any] | None = None

    def started(self) -> list[Any]:
        """Return the handles of all actors.

        Raises:
            RayError: If Ray is missing, or the cluster cannot be reached or is too small.
        """
        if self._actors:
            return self._actors
        ray, settings = _ray(), self._settings
        if not ray.is_initialized():
            try:
                ray.init(address=settings.address, include_dashboard=False, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise RayError(
                    f"ray.address must be that of a running Ray cluster, auto, or null to start one here; got "
                    f"{settings.address!r}: {' '.join(str(error).split())[:300]}"
                ) from error
        room = _room(ray.cluster_resources(), settings)
        number = settings.num_actors or room
        if number > room:
            raise RayError(f"ray.num_actors must be at most what the cluster has room for, {room} here; got {number}")
        shared = share(self._model)
        shared.memory.seek(0)
        memory = ray.put(np.frombuffer(shared.memory.read(), dtype=np.uint8))
        shared.memory.close()
        start = Start(
            shared.description,
            "cuda" if settings.gpus else "cpu",
            settings.cpus,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        )
        options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        self._make = lambda: ray.remote(Actor).options(**options).remote(memory, start)
        self._actors += [self._make() for _ in range(number)]
        weakref.finalize(self, _end, self._actors)
        return self._actors

    def replace(self, index: int) -> None:
        """Start a new actor in the place of one that was lost."""
        assert self._make is not None
        self._actors[index] = self._make()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RayError("training on a Ray cluster needs Ray; install it with: pip install 'flexlora[ray]'") from error
    return ray


def _room(resources: Mapping[str, float], settings: ActorSettings) -> int:
    """Return how many actors fit into a cluster."""
    number = int(resources.get("CPU", 0) // settings.cpus)
    if settings.gpus:
        number = min(number, int(resources.get("GPU", 0) / settings.gpus))
    if number < 1:
        raise RayError(
            f"an actor must fit into the cluster; it needs {settings.cpus} CPUs and {settings.gpus:g} GPUs, there are "
            f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}: lower ray.cpus_per_actor or "
            "ray.gpus_per_actor, or add machines"
        )
    return number


def _end(actors: Sequence[Any]) -> None:
    ray = _ray()
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)


@dataclass(frozen=True)
class RayEngine:
    """An engine whose clients train on a cluster.

    Attributes:
        engine: Says how to train; trains here what cannot travel.
        actors: The cluster.
    """

    engine: SimulationEngine
    actors: RayActors

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order, as soon as it is there.

        The clients of the chunks that an actor had when it died become failures; another takes its place.

        Raises:
            RayError: If there is no cluster to train on.
        """
        ray, actors = _ray(), self.actors.started()
        engine = self.engine
        chunks = cut_into_chunks(order.cohort, engine.examples_of, engine.settings, engine.model.device.type)
        packets: dict[RankPlan, bytes | Exception] = {}
        sent: dict[RankPlan, Any] = {}
        waiting: deque[tuple[Chunk, Any]] = deque()
        loads = dict.fromkeys(range(len(actors)), 0)
        actor_of: dict[Any, tuple[int, Any]] = {}
        numbers = itertools.count()
        try:
            while True:
                while len(waiting) < _CHUNKS_PER_ACTOR * len(actors) and (chunk := next(chunks, None)) is not None:
                    plans = list(dict.fromkeys(client.plan for client in chunk.clients))
                    for plan in plans:
                        if plan not in packets:
                            packets[plan] = _packet(order, plan)
                    if len(chunk.examples) < len(chunk.clients) or any(
                        isinstance(packets[plan], Exception) for plan in plans
                    ):
                        waiting.append((chunk, None))
                        continue
                    for plan in plans:
                        if plan not in sent:
                            sent[plan] = ray.put(packets[plan])
                    actor = min(loads, key=lambda index: loads[index])
                    task = pickle.dumps(self._task(order, chunk, next(numbers)))
                    future = actors[actor].train.remote(task, plans, *(sent[plan] for plan in plans))
                    loads[actor] += 1
                    actor_of[future] = actor, actors[actor]
                    waiting.append((chunk, future))
                if not waiting:
                    return
                chunk, future = waiting.popleft()
                if future is None:
                    # What is missing makes failures of its clients here, with their reasons.
                    yield from engine.train(replace(order, cohort=chunk.clients))
                    continue
                actor, asked = actor_of.pop(future)
                try:
                    outcomes = [unpacked(outcome) for outcome in ray.get(future)]
                except ray.exceptions.RayError as error:
                    is_lost = isinstance(error, ray.exceptions.RayActorError)
                    # What else it had to do fails with the same actor, whose place another one has by then.
                    if is_lost and actors[actor] is asked:
                        self.actors.replace(actor)
                    outcomes = _failures(chunk, packets, error if is_lost else getattr(error, "cause", error), is_lost)
                loads[actor] -= 1
                yield from outcomes
        finally:
            for _, future in waiting:
                if future is not None:
                    ray.cancel(future)

    def _task(self, order: RoundOrder, chunk: Chunk, number: int) -> Task:
        return Task(
            call=number,
            clients=chunk.clients,
            examples={client_id: list(examples) for client_id, examples in chunk.examples.items()},
            packets={},
            order=pickled_order(order),
            engine=pickled_settings(self.engine),
        )


def _packet(order: RoundOrder, plan: RankPlan) -> bytes | Exception:
    try:
        return order.parcels[plan].packet
    except Exception as error:
        return error


def _failures(
    chunk: Chunk, packets: Mapping[RankPlan, bytes | Exception], error: Exception, is_lost: bool
) -> list[Update | ClientFailure]:
    reason = f"the actor that was to train it was lost: {type(error).__name__}" if is_lost else reason_of(error)
    _log.warning("%d clients of a chunk are lost: %s", len(chunk.clients), " ".join(str(error).split())[:300])
    sizes = {plan: len(packet) for plan, packet in packets.items() if isinstance(packet, bytes)}
    return [ClientFailure(client.client_id, "train", reason, sizes.get(client.plan, 0)) for client in chunk.clients]
