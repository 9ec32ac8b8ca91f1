"""Trains a cohort in several processes, on all cores or GPUs: this one and children that share its base weights.

This process trains too, so that a short run waits for no child: children are started once training has taken some
seconds, and join in when they are ready. Neither the chunks nor the threads of a process depend on the number of
processes, so the outcomes are the same bits however many there are.
"""

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from typing import IO

from flexlora.engines.base import ParcelKey, RoundOrder
from flexlora.engines.chunk_trainer import AskTask, Start, TrainTask, start_like_here, unpacked
from flexlora.engines.dispatch import ChunkLostError, Dispatcher, TrainerPool
from flexlora.engines.process_child import READY
from flexlora.engines.shared_model import SharedModel, SharingError, share
from flexlora.engines.simulation import SimulationEngine
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure, Reply, Update
from flexlora.training.adapted_model import AdaptedModel

# Starting a child costs a core some seconds; a run that ends sooner needs no child.
_SECONDS_BEFORE_CHILDREN = 2.0

_LAST_WORDS = 2000

_log = logging.getLogger(__name__)


class ChildError(FlexLoraError, RuntimeError):
    """A child process that could not be started, or ended before it trained anything."""


class ChildProcesses:
    """Child processes for the engines of one model: started when needed, ended with this object or this process."""

    def __init__(
        self,
        model: AdaptedModel,
        devices: Sequence[str],
        num_threads: int,
        *,
        seconds_before_children: float = _SECONDS_BEFORE_CHILDREN,
    ) -> None:
        """Start nothing yet.

        Args:
            model: Of the engines.
            devices: Of the children, one each.
            num_threads: CPU threads of every process while it trains.
            seconds_before_children: Time that training takes in this process before children are started.
        """
        self.devices, self.num_threads = devices, num_threads
        self.pool = TrainerPool()
        self.trainers: list[ChildTrainer] = []
        self._model, self._seconds_before_children = model, seconds_before_children
        self._shared: SharedModel | None = None
        self.close = weakref.finalize(self, self.pool.close)

    def start(self, most: int) -> None:
        """Start the children that are missing up to ``most``, once it is worth it; training continues if that fails."""
        pool = self.pool
        if pool.seconds_here < self._seconds_before_children or pool.has_given_up or pool.is_closed:
            return
        for device in self.devices[len(self.trainers) : most]:
            if self._shared is None:
                try:
                    self._shared = share(self._model)
                except (SharingError, OSError) as error:
                    pool.give_up(str(error))
                    return
                pool.resources.callback(self._shared.memory.close)
            self.trainers.append(ChildTrainer(self._shared, device, self.num_threads))
            pool.add(self.trainers[-1])

    def are_ready(self) -> bool:
        """Return whether every child has trained a chunk."""
        return len(self.trainers) == len(self.devices) and all(trainer.has_trained for trainer in self.trainers)


@dataclass(frozen=True)
class ProcessEngine:
    """An engine that trains in this process and its children.

    Attributes:
        engine: How to train.
        children: The other processes.
    """

    engine: SimulationEngine
    children: ChildProcesses

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order, as soon as it is there.

        The clients that a child was training when it died become failures; a new child replaces it. If the caller stops
        early, for example because it is interrupted, the children that are at work are ended.
        """
        return self._dispatcher.train(
            order,
            num_processes=1 + len(self.children.devices),
            shares_work=True,
            before_chunk=lambda: self.children.start(len(order.cohort) - 1),
        )

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request, in their order; what a child that died held is lost."""
        return self._dispatcher.ask(kind, requests)

    def forget(self) -> None:
        """Let all clients drop what they hold."""
        self._dispatcher.forget()

    @cached_property
    def _dispatcher(self) -> Dispatcher:
        return Dispatcher(self.engine, self.children.pool, self.children.num_threads)


class ChildTrainer:
    """Trains chunks in a child process; starts another child when that one has ended."""

    def __init__(self, shared: SharedModel, device: str, num_threads: int) -> None:
        """Start nothing yet."""
        self._memory, self._start = shared.memory, start_like_here(shared.description, device, num_threads)
        self._child: _Child | None = None
        self._lock, self._is_closed = threading.Lock(), False

    @property
    def process(self) -> "subprocess.Popen[bytes] | None":
        """The child process, if there is one."""
        return None if self._child is None else self._child.process

    @property
    def has_trained(self) -> bool:
        """Whether the child has begun to train a chunk."""
        return self._child is not None and self._child.has_trained

    def prepare(self) -> None:
        """Start a child if there is none, and wait until it has the model.

        Raises:
            ChildError: If it cannot be started.
        """
        if self._child is not None:
            return
        with self._lock:
            if self._is_closed:
                raise ChildError("no child is started while this process ends")
            child = self._child = _Child(self._memory)
        try:
            child.send(self._start)
        except (EOFError, OSError) as error:
            raise ChildError(self._end(child)) from error

    def train(self, task: TrainTask) -> Iterator[Update | ClientFailure]:
        """Yield the outcome of each client of a task.

        Raises:
            ChunkLostError: If the child ends first.
            ChildError: If it ends before it has ever begun to train.
        """
        # The child that was prepared may have died since, while it answered.
        self.prepare()
        child, has_begun = self._child, False
        assert child is not None
        try:
            child.send(replace(task, packets=child.lacking(task)))
            has_begun = child.has_trained = True
            for _ in task.clients:
                yield unpacked(child.connection.recv_bytes())
        except Exception as error:
            if not isinstance(error, EOFError | OSError):
                _log.warning("A child process sent an unexpected reply and was stopped: %s", error)
            reason = self._end(child)
            if not (child.has_trained or child.is_stopped):
                raise ChildError(reason) from error
            raise ChunkLostError(f"{reason} while it trained this client", has_begun=has_begun) from error

    def ask(self, task: AskTask) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request of a task, in their order.

        Raises:
            ChunkLostError: If the child ends first, or has ended.
        """
        child = self._child
        if child is None:
            raise ChunkLostError("the child process that held what this client trained has ended", has_begun=True)
        try:
            child.send(task)
            for _ in task.requests:
                yield pickle.loads(child.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise ChunkLostError(f"{self._end(child)} while it answered", has_begun=True) from error

    def stop(self) -> None:
        """Kill the child; the next chunk gets a new one."""
        with self._lock:
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """Kill the child and start no other."""
        self._is_closed = True
        self.stop()

    def _end(self, child: "_Child") -> str:
        """Free what a child held and return how it ended."""
        with self._lock:
            self._child = None
        return child.end()


class _Child:
    """A child process.

    Attributes:
        process: The process.
        connection: To it.
        has_trained: Whether it has begun to train a chunk.
        is_stopped: Whether it was killed on purpose.
    """

    def __init__(self, memory: IO[bytes]) -> None:
        self.has_trained = self.is_stopped = False
        self._call, self._keys = -1, set[ParcelKey]()
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = map(stack.enter_context, socket.socketpair())
            descriptors = (theirs.fileno(), memory.fileno())
            self.process = subprocess.Popen(
                # With the paths of this process and no working folder before them, so that it finds the same modules.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "flexlora.engines.process_child",
                    *map(str, descriptors),
                    str(os.getpid()),
                ],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                # Ctrl-C in a terminal goes to the parent alone.
                start_new_session=True,
            )
            theirs.close()
            self.connection = Connection(ours.detach())
            stack.pop_all()

    def send(self, message: Start | TrainTask | AskTask) -> None:
        """Send a message and wait until the child is ready for what follows."""
        # Not with the connection's own pickling, which torch teaches to send tensors as open files.
        self.connection.send_bytes(pickle.dumps(message))
        if self.connection.recv_bytes() != READY:
            raise OSError("the process answered out of turn")

    def lacking(self, task: TrainTask) -> dict[ParcelKey, bytes]:
        """Return the packets of a task that the child has not been sent in this call."""
        if task.call != self._call:
            self._call, self._keys = task.call, set()
        packets = {key: packet for key, packet in task.packets.items() if key not in self._keys}
        self._keys |= packets.keys()
        return packets

    def kill(self) -> None:
        """Kill the process on purpose."""
        self.is_stopped = True
        self.process.kill()
        self.process.wait()
        self._errors.close()

    def end(self) -> str:
        """End the process if it has not ended, free what it held, and return how it ended."""
        self.connection.close()
        if self.is_stopped:
            return f"the child process {self.process.pid} was stopped"
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        with self._errors as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_WORDS))
            words = file.read().decode(errors="replace").split("\n")
        if code < 0:
            hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
            return f"the child process {self.process.pid} was killed (signal {-code}{hint})"
        last = next((line.strip() for line in reversed(words) if line.strip()), "no message")
        return f"the child process {self.process.pid} ended with exit status {code}: {last}"
