"""Trains a cohort in several processes, on all cores or GPUs: this one and children that share its base weights.

The cohort is cut into chunks, and each is trained by a ``SimulationEngine``, in whichever process is free. This process
trains too, so that a short run waits for nobody: children are started once training has taken some seconds, and join in
when they are ready. The cut does not depend on the processes, and each trains with the same number of threads, so the
outcomes are the same bits however many there are.
"""

import itertools
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from multiprocessing.connection import Connection

import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import RoundOrder
from flexlora.engines.chunks import Chunk, cut_into_chunks
from flexlora.engines.process_child import READY, Start, Task, pickled_order, pickled_settings, unpacked
from flexlora.engines.shared_model import SharedModel, SharingError, share
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.clients import RankPlan
from flexlora.federation.messages import ClientFailure, Update
from flexlora.training.adapted_model import AdaptedModel

# To start a child costs a core some seconds; who is through before that needs none.
_SECONDS_BEFORE_CHILDREN = 2.0


# Chunks that are trained or wait for an earlier one, per process.
_OPEN_CHUNKS = 2


_LAST_WORDS = 2000


_MOST_SECONDS_TO_END = 5.0


_log = logging.getLogger(__name__)


class Workers:
    """Child processes for the engines of one model: started when needed, gone with this object or this process."""

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
        self.num_threads = num_threads
        self.pool = _Pool(len(devices))
        self._model, self._devices, self._patience = model, devices, seconds_before_children
        self.close = weakref.finalize(self, self.pool.close)

    def start(self, most: int) -> None:
        """Start the children that are missing up to ``most``, once it is worth it; training goes on if that fails."""
        pool = self.pool
        if pool.seconds < self._patience or pool.gave_up or not self.close.alive:
            return
        try:
            for slot, device in enumerate(self._devices[:most]):
                if pool.children[slot] is None:
                    pool.shared = pool.shared or share(self._model)
                    pool.add(slot, _Child(pool.shared, device, self.num_threads))
        except (SharingError, OSError) as error:
            pool.give_up(str(error))


@dataclass(frozen=True)
class WorkersEngine:
    """An engine that shares its work with other processes.

    Attributes:
        engine: Says how to train, and does it in this process.
        workers: The other processes.
    """

    engine: SimulationEngine
    workers: Workers

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order, as soon as it is there.

        The clients that a child was training when it died become failures; a new child takes its place in the next
        call. Whoever stops listening before the end, as by an interruption, ends the children that are at work.
        """
        pool = self.workers.pool
        most_open = _OPEN_CHUNKS * (1 + len(pool.children))
        call = _Call(self.engine, order, pool.condition, most_open)
        here: Iterator[bool] | None = None
        with pool.serving(call):
            while True:
                if here is None:
                    self.workers.start(len(order.cohort) - 1)
                with pool.condition:
                    outcome = call.next_outcome()
                    if outcome is None and here is None:
                        turn = call.take(here=True)
                        if turn is not None:
                            here = self._train_here(call, turn)
                        elif call.is_over:
                            return
                        else:
                            pool.condition.wait()
                if outcome is not None:
                    yield outcome
                elif here is not None and not next(here, False):
                    here = None

    def _train_here(self, call: "_Call", turn: "_Turn") -> Iterator[bool]:
        """Train a chunk in this process, a client at each step of this iterator."""
        pool, engine = self.workers.pool, self._engine_here
        self._examples.in_hand.update(turn.chunk.examples)
        outcomes = engine.train(replace(call.order, cohort=turn.chunk.clients))
        try:
            while turn.num_left:
                start = time.perf_counter()
                with _threads(self.workers.num_threads):
                    outcome = next(outcomes)
                pool.seconds += time.perf_counter() - start
                with pool.condition:
                    call.put(turn, outcome)
                yield True
        finally:
            for client_id in turn.chunk.examples:
                self._examples.in_hand.pop(client_id, None)

    @cached_property
    def _engine_here(self) -> SimulationEngine:
        return replace(self.engine, examples_of=self._examples)

    @cached_property
    def _examples(self) -> "_Examples":
        return _Examples(self.engine.examples_of, self.workers.pool.condition)


@dataclass(frozen=True)
class _Examples:
    """The examples of the chunk that this process trains; any others are asked for."""

    ask: Callable[[str], Sequence[EncodedExample]]
    condition: threading.Condition
    in_hand: dict[str, Sequence[EncodedExample]] = field(default_factory=dict)

    def __call__(self, client_id: str) -> Sequence[EncodedExample]:
        if client_id in self.in_hand:
            return self.in_hand[client_id]
        # Another thread may be cutting chunks, and tokenizers serve one at a time.
        with self.condition:
            return self.ask(client_id)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == number:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(eq=False)
class _Turn:
    """A chunk on its way: outcomes wait here until those of all earlier clients have been yielded."""

    chunk: Chunk
    num_left: int
    outcomes: deque[Update | ClientFailure] = field(default_factory=deque)


class _Call:
    """One call of ``train``. Whoever uses it holds ``condition``, which is told of what others may wait for."""

    _numbers = itertools.count()

    def __init__(
        self,
        engine: SimulationEngine,
        order: RoundOrder,
        condition: threading.Condition,
        most_open: int,
    ) -> None:
        self.order = order
        self._number, self._engine = next(self._numbers), engine
        self._condition, self._most_open = condition, most_open
        self._chunks = cut_into_chunks(order.cohort, engine.examples_of, engine.settings, engine.model.device.type)
        self._is_cut = False
        # In cohort order; those in `_back` are without anybody who trains them.
        self._open: deque[_Turn] = deque()
        self._back: list[_Turn] = []

    @property
    def is_over(self) -> bool:
        """Whether every outcome has been given out."""
        return self._is_cut and not self._open

    def next_outcome(self) -> Update | ClientFailure | None:
        """Return the next outcome in cohort order, or None if it is not there."""
        while self._open and not self._open[0].outcomes and not self._open[0].num_left:
            self._open.popleft()
            self._condition.notify_all()
        return self._open[0].outcomes.popleft() if self._open and self._open[0].outcomes else None

    def take(self, *, here: bool) -> _Turn | None:
        """Return a chunk to train, here or in a child; None if there is none, or too many are open."""
        for turn in self._back:
            if here or self._can_travel(turn.chunk):
                self._back.remove(turn)
                return turn
        while len(self._open) < self._most_open:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._is_cut = True
                return None
            turn = _Turn(chunk, len(chunk.clients))
            self._open.append(turn)
            if here or self._can_travel(chunk):
                return turn
            self.give_back(turn)
        return None

    def put(self, turn: _Turn, outcome: Update | ClientFailure) -> None:
        """Take the next outcome of a chunk."""
        turn.outcomes.append(outcome)
        turn.num_left -= 1
        self._condition.notify_all()

    def give_back(self, turn: _Turn) -> None:
        """Take back a chunk that nobody has begun."""
        self._back.append(turn)
        self._condition.notify_all()

    def fail(self, turn: _Turn, reason: str) -> None:
        """Make failures of the clients of a chunk whose outcomes are missing."""
        for client in turn.chunk.clients[len(turn.chunk.clients) - turn.num_left :]:
            self.put(
                turn, ClientFailure(client.client_id, "train", reason, len(self.order.parcels[client.plan].packet))
            )

    def task(self, turn: _Turn, child: "_Child") -> Task:
        """Return a chunk as it is sent to ``child``, with the broadcasts that has not got yet."""
        if child.call_number != self._number:
            child.call_number, child.plans = self._number, set()
        plans = {client.plan for client in turn.chunk.clients} - child.plans
        child.plans |= plans
        engine, order = self._settings or (b"", b"")
        return Task(
            call=self._number,
            clients=turn.chunk.clients,
            examples={client_id: list(examples) for client_id, examples in turn.chunk.examples.items()},
            packets={plan: self.order.parcels[plan].packet for plan in plans},
            order=order,
            engine=engine,
        )

    def _can_travel(self, chunk: Chunk) -> bool:
        """Return whether nothing is missing; what is, becomes a failure of its clients here."""
        if self._settings is None or len(chunk.examples) < len(chunk.clients):
            return False
        try:
            for plan in {client.plan for client in chunk.clients}:
                _ = self.order.parcels[plan].packet
        except Exception:
            return False
        return True

    @cached_property
    def _settings(self) -> tuple[bytes, bytes] | None:
        try:
            return pickled_settings(self._engine), pickled_order(self.order)
        except Exception as error:
            _log.warning("Clients train in one process, as others cannot be told how: %s.", error)
            return None


class _Child:
    """A child process. The thread that serves it reads and writes; anybody may kill it.

    Attributes:
        process: The process.
        work: What it is training, or about to.
        has_begun: Whether it has begun with that.
        has_worked: Whether it has ever begun to train a chunk.
        is_dismissed: Whether it was ended on purpose.
        call_number: Of the call that ``plans`` is about.
        plans: Whose broadcasts it has got.
    """

    def __init__(self, shared: SharedModel, device: str, num_threads: int) -> None:
        self.work: tuple[_Call, _Turn] | None = None
        self.has_begun = self.has_worked = self.is_dismissed = False
        self.call_number, self.plans = -1, set[RankPlan]()
        self._start = Start(
            shared.description,
            device,
            num_threads,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        )
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = map(stack.enter_context, socket.socketpair())
            descriptors = (theirs.fileno(), shared.memory.fileno())
            self.process = subprocess.Popen(
                # Without the working folder in front, and with this process's paths: the same modules are found.
                [sys.executable, "-P", "-m", "flexlora.engines.process_child", *map(str, descriptors)],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                # Ctrl-C in a terminal goes to the parent alone.
                start_new_session=True,
            )
            theirs.close()
            self._connection = Connection(ours.detach())
            stack.pop_all()

    def greet(self) -> None:
        """Hand over the model and wait until the child has it."""
        self._send(self._start)

    def begin(self, task: Task) -> None:
        """Hand over a chunk and wait until the child begins."""
        self._send(task)
        self.has_begun = self.has_worked = True

    def outcome(self) -> Update | ClientFailure:
        """Return the next outcome of its chunk, waiting for it."""
        return unpacked(self._connection.recv_bytes())

    def _send(self, message: Start | Task) -> None:
        # Not the connection's own pickling, which torch teaches to send tensors as open files.
        self._connection.send_bytes(pickle.dumps(message))
        if self._connection.recv_bytes() != READY:
            raise OSError("the process answered out of turn")

    def dismiss(self) -> None:
        """End the process without asking why."""
        self.is_dismissed = True
        self.process.kill()
        self.process.wait()
        self._errors.close()

    def bury(self) -> str:
        """End the process if it has not ended, free what it held, and return how it ended."""
        self._connection.close()
        if self.is_dismissed:
            return "the worker process was dismissed"
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
            return f"the worker process {self.process.pid} was killed (signal {-code}{hint})"
        last = next((line.strip() for line in reversed(words) if line.strip()), "no message")
        return f"the worker process {self.process.pid} ended with exit status {code}: {last}"


class _Pool:
    """The children, the calls they work for, and a thread for each child that brings the two together.

    Attributes:
        condition: Guards everything here and in the calls; told of every change.
        shared: The model, once children have been started.
        children: One per slot, None where it is missing.
        seconds: Time that training has taken in this process.
        gave_up: Whether children that are missing stay so.
    """

    def __init__(self, size: int) -> None:
        self.condition = threading.Condition()
        self.shared: SharedModel | None = None
        self.children: list[_Child | None] = [None] * size
        self.seconds, self.gave_up = 0.0, False
        self._calls: list[_Call] = []
        self._threads: list[threading.Thread] = []
        self._is_closed = False

    def add(self, slot: int, child: _Child) -> None:
        """Take in a child that has just been started."""
        self.children[slot] = child
        thread = threading.Thread(target=self._serve, args=(slot, child), daemon=True)
        self._threads = [*(other for other in self._threads if other.is_alive()), thread]
        thread.start()

    def give_up(self, reason: str) -> None:
        """Start no more children, and say why."""
        if not self.gave_up:
            self.gave_up = True
            _log.warning("Training goes on in fewer processes than planned, one could not be started: %s.", reason)

    @contextmanager
    def serving(self, call: _Call) -> Iterator[None]:
        """Let the children work for ``call``; afterwards, end those that still do."""
        with self.condition:
            self._calls.append(call)
            self.condition.notify_all()
        try:
            yield
        finally:
            with self.condition:
                self._calls.remove(call)
                for slot, child in enumerate(self.children):
                    if (
                        child is not None
                        and child.work is not None
                        and child.work[0] is call
                        and child.work[1].num_left
                    ):
                        self.children[slot] = None
                        child.dismiss()

    def close(self) -> None:
        """End all children."""
        with self.condition:
            self._is_closed = True
            for child in self.children:
                if child is not None:
                    child.dismiss()
            if self.shared is not None:
                self.shared.memory.close()
            self.condition.notify_all()
        # A thread that still runs when the interpreter ends would be torn out of the middle of native code. One that is
        # closing the pool itself, as the garbage collector may have it do, does not wait for the others.
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join(_MOST_SECONDS_TO_END)

    def _serve(self, slot: int, child: _Child) -> None:
        """Be the thread of a child: hand it chunk after chunk until one of the two ends."""
        try:
            child.greet()
            while (work := self._next_work(child)) is not None:
                self._train_there(child, *work)
                # A thread that waits keeps no chunk alive.
                del work
        except Exception as error:
            if not isinstance(error, EOFError | OSError):
                _log.warning("A worker process answered something odd and is ended: %s", error)
        with self.condition:
            self._bury(slot, child)

    def _train_there(self, child: _Child, call: _Call, turn: _Turn) -> None:
        with self.condition:
            task = call.task(turn, child)
        child.begin(task)
        while turn.num_left:
            outcome = child.outcome()
            with self.condition:
                call.put(turn, outcome)

    def _bury(self, slot: int, child: _Child) -> None:
        """Do what is left to do when a child has ended: somebody else trains its clients, or they have failed."""
        reason = child.bury()
        if self.children[slot] is child:
            self.children[slot] = None
        if child.is_dismissed:
            return
        if child.work is not None and child.work[1].num_left:
            call, turn = child.work
            if child.has_begun:
                call.fail(turn, f"{reason} while it trained this client")
            else:
                call.give_back(turn)
        if not child.has_worked:
            self.give_up(reason)

    def _next_work(self, child: _Child) -> tuple[_Call, _Turn] | None:
        """Return the next chunk for a child, waiting for one; None when there will be no more."""
        with self.condition:
            child.work, child.has_begun = None, False
            while not (self._is_closed or child.is_dismissed):
                for call in self._calls:
                    if (turn := call.take(here=False)) is not None:
                        child.work = (call, turn)
                        return child.work
                self.condition.wait()
            return None
