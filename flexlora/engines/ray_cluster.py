"""Trains a cohort on a Ray cluster, for those who need more than one machine: its actors train chunks of clients.

It uses Ray itself rather than Flower's simulation, which sends an actor one client's message at a time: here an actor
gets a chunk, so its clients share passes, and the broadcast of a rank plan travels to each machine once. The cohort is
cut as for the processes of one machine and trained with the same number of threads, so machines of one kind give the
same bits. Needs the extra ``flexlora[ray]``.
"""

import logging
import os
import pickle
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from flexlora.engines.base import ParcelKey, RoundOrder
from flexlora.engines.chunk_trainer import AskTask, ChunkTrainer, Start, TrainTask, start_like_here, unpacked
from flexlora.engines.dispatch import ChunkLostError, Dispatcher, TrainerPool
from flexlora.engines.shared_model import share
from flexlora.engines.simulation import SimulationEngine, reason_of
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure, Reply, Update
from flexlora.training.adapted_model import AdaptedModel

# Chunks that an actor has, so that it does not idle while the next one travels.
_CHUNKS_PER_ACTOR = 2

_log = logging.getLogger(__name__)


class RayError(FlexLoraError, RuntimeError):
    """Ray is not installed, its cluster cannot be reached, or the cluster is too small."""


@dataclass(frozen=True)
class ActorSettings:
    """The cluster and its actors.

    Attributes:
        address: Of a running cluster, ``auto`` for the one this machine belongs to, None to start one here.
        num_actors: None means as many as the cluster has room for.
        cpus: CPUs of an actor, and threads with which it trains.
        gpus: GPUs of an actor; 0 trains on CPUs.
    """

    address: str | None = None
    num_actors: int | None = None
    cpus: int = 1
    gpus: float = 0.0


class Actor:
    """Runs in the cluster: trains chunks on its copy of the base."""

    def __init__(self, memory: np.ndarray, start: Start) -> None:
        """Take the base as ``share`` wrote it."""
        with tempfile.TemporaryFile() as file:
            file.write(memory.data)
            file.flush()
            self._trainer = ChunkTrainer(file.fileno(), start)

    def pid(self) -> int:
        """Return the number of the actor's process."""
        return os.getpid()

    def train(self, task: bytes, keys: Sequence[ParcelKey], *packets: bytes) -> list[bytes]:
        """Return the packed outcome of each client of a task."""
        packets_of = dict(zip(keys, packets, strict=True))
        return list(self._trainer.begin(replace(pickle.loads(task), packets=packets_of)))

    def ask(self, task: bytes) -> list[bytes]:
        """Return the pickled reply of each client of a task."""
        return list(self._trainer.answers(pickle.loads(task)))


class RayActors:
    """The actors of one model: started when first needed, ended with this object."""

    def __init__(self, model: AdaptedModel, settings: ActorSettings) -> None:
        """Start nothing yet."""
        self.settings, self.pool = settings, TrainerPool()
        self._model = model
        self._handles: list[Any] = []
        weakref.finalize(self, self.pool.close)

    def started(self) -> list[Any]:
        """Return the handles of all actors.

        Raises:
            RayError: If Ray is missing, or the cluster cannot be reached or is too small.
        """
        if self._handles:
            return self._handles
        ray, settings = _ray(), self.settings
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
        make = self._maker(ray)
        self._handles += [make() for _ in range(number)]
        self.pool.resources.callback(_kill, self._handles)
        queues = _Queues(ray, self._handles, make)
        for _ in range(_CHUNKS_PER_ACTOR * number):
            self.pool.add(_RayTrainer(queues))
        return self._handles

    def _maker(self, ray: Any) -> Callable[[], Any]:
        settings, shared = self.settings, share(self._model)
        shared.memory.seek(0)
        memory = ray.put(np.frombuffer(shared.memory.read(), dtype=np.uint8))
        shared.memory.close()
        start = start_like_here(shared.description, "cuda" if settings.gpus else "cpu", settings.cpus)
        options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus}
        return lambda: ray.remote(Actor).options(**options).remote(memory, start)


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


def _kill(actors: Sequence[Any]) -> None:
    ray = _ray()
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)


@dataclass(frozen=True)
class RayEngine:
    """An engine whose clients train on a cluster.

    Attributes:
        engine: How to train; trains here what cannot be sent to an actor.
        actors: The cluster.
    """

    engine: SimulationEngine
    actors: RayActors

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order, as soon as it is there.

        The clients of the chunks that an actor had when it died become failures; a new actor replaces it.

        Raises:
            RayError: If there is no cluster to train on.
        """
        num_processes = len(self.actors.started())
        return self._dispatcher.train(order, num_processes=num_processes, shares_work=False, before_chunk=lambda: None)

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request, in their order; what an actor that died held is lost."""
        return self._dispatcher.ask(kind, requests)

    def forget(self) -> None:
        """Let all clients drop what they hold."""
        self._dispatcher.forget()

    @cached_property
    def _dispatcher(self) -> Dispatcher:
        return Dispatcher(self.engine, self.actors.pool, self.actors.settings.cpus)


class _Queues:
    """The actors and how many chunks each of them has; safe to use from several threads."""

    def __init__(self, ray: Any, handles: list[Any], make: Callable[[], Any]) -> None:
        self.ray = ray
        self._handles, self._make = handles, make
        self._loads = [0] * len(handles)
        self._lock, self._is_closed = threading.Lock(), False
        self._call, self._packets = -1, dict[ParcelKey, Any]()
        self._holders: dict[str, Any] = {}

    def submit(self, task: TrainTask) -> tuple[int, Any, Any]:
        """Give a task to the actor that has the fewest; return its number, its handle and the future."""
        with self._lock:
            if task.call != self._call:
                self._call, self._packets = task.call, {}
            for key, packet in task.packets.items():
                if key not in self._packets:
                    self._packets[key] = self.ray.put(packet)
            index = min(range(len(self._loads)), key=self._loads.__getitem__)
            self._loads[index] += 1
            packets = [self._packets[key] for key in task.packets]
            handle = self._handles[index]
            data = pickle.dumps(replace(task, packets={}))
            return index, handle, handle.train.remote(data, list(task.packets), *packets)

    def finish(self, index: int, handle: Any, *, is_lost: bool) -> None:
        """Count a task of an actor as done; replace an actor that is lost and not replaced yet."""
        with self._lock:
            self._loads[index] -= 1
        if is_lost:
            self.replace(handle)

    def replace(self, handle: Any) -> None:
        """Start an actor in the place of one that is lost, unless that has been done."""
        with self._lock:
            if handle in self._handles and not self._is_closed:
                self._handles[self._handles.index(handle)] = self._make()

    def hold(self, client_ids: Iterable[str], handle: Any) -> None:
        """Note which actor holds what these clients trained."""
        with self._lock:
            self._holders |= dict.fromkeys(client_ids, handle)

    def parts_of(self, task: AskTask) -> list[tuple[Any, AskTask]]:
        """Return a task in parts, one for each actor that is concerned; the end of a round concerns all that hold."""
        with self._lock:
            if task.kind is None:
                handles, self._holders = set(self._holders.values()), {}
                return [(handle, task) for handle in handles]
            parts: dict[Any, dict[str, bytes]] = {}
            for client_id, request in task.requests.items():
                parts.setdefault(self._holders[client_id], {})[client_id] = request
            return [(handle, AskTask(task.kind, part)) for handle, part in parts.items()]

    def close(self) -> None:
        """Replace no more actors."""
        with self._lock:
            self._is_closed = True


class _RayTrainer:
    """Trains chunks in whichever actor has the fewest."""

    def __init__(self, queues: _Queues) -> None:
        self._queues = queues
        self._future: Any = None

    def prepare(self) -> None:
        """Do nothing: Ray keeps a task until its actor is ready."""

    def train(self, task: TrainTask) -> Iterator[Update | ClientFailure]:
        """Yield the outcome of each client of a task.

        Raises:
            ChunkLostError: If the actor was lost or the task went wrong there.
        """
        exceptions, is_lost = self._queues.ray.exceptions, False
        index, handle, self._future = self._queues.submit(task)
        try:
            outcomes = self._queues.ray.get(self._future)
        except exceptions.RayError as error:
            is_lost = isinstance(error, exceptions.RayActorError)
            reason = (
                f"the actor that was to train it was lost: {type(error).__name__}"
                if is_lost
                else reason_of(getattr(error, "cause", error))
            )
            _log.warning("%d clients of a chunk are lost: %s", len(task.clients), " ".join(str(error).split())[:300])
            raise ChunkLostError(reason, has_begun=True) from error
        finally:
            self._queues.finish(index, handle, is_lost=is_lost)
        for outcome in map(unpacked, outcomes):
            if isinstance(outcome, Update) and outcome.is_held:
                self._queues.hold([str(outcome.client_id)], handle)
            yield outcome

    def ask(self, task: AskTask) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request of a task, in their order; those of an actor that is lost fail."""
        ray, replies = self._queues.ray, dict[str, Reply | ClientFailure]()
        futures = [
            (handle, part, handle.ask.remote(pickle.dumps(part))) for handle, part in self._queues.parts_of(task)
        ]
        for handle, part, self._future in futures:
            try:
                found = [pickle.loads(data) for data in ray.get(self._future)]
            except ray.exceptions.RayError as error:
                if isinstance(error, ray.exceptions.RayActorError):
                    self._queues.replace(handle)
                reason = f"the actor that held what this client trained was lost: {type(error).__name__}"
                found = [ClientFailure(one, str(task.kind), reason, len(data)) for one, data in part.requests.items()]
            replies |= {reply.client_id: reply for reply in found}
        yield from (replies[client_id] for client_id in task.requests)

    def stop(self) -> None:
        """Cancel the task, unless its actor has begun."""
        if self._future is not None:
            self._queues.ray.cancel(self._future)

    def close(self) -> None:
        """Replace no more actors; they are killed with their pool."""
        self._queues.close()
