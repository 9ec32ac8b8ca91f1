"""Dispatches the chunks of a cohort to trainers in other processes, and yields the outcomes in cohort order.

An engine supplies its trainers: how one is started, talked to and ended. Each trainer has a thread here that gives it a
chunk whenever it is free. This process trains too, if the engine wants it to, and always trains what cannot be sent to
a trainer. A chunk that a trainer loses becomes failures of its clients, or is trained by another if none had begun.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch

from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import RoundOrder
from flexlora.engines.chunk_trainer import AskTask, TrainTask
from flexlora.engines.chunks import Chunk
from flexlora.engines.open_round import OpenChunk, OpenRound
from flexlora.engines.simulation import SimulationEngine
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure, Reply, Update

# Chunks that are being trained or wait for an earlier one, per process.
_OPEN_CHUNKS = 2

_MOST_SECONDS_TO_END = 5.0

_log = logging.getLogger(__name__)


class ChunkLostError(FlexLoraError, RuntimeError):
    """A chunk was given to a trainer and its remaining outcomes will not come; the trainer can take another chunk."""

    def __init__(self, reason: str, *, has_begun: bool) -> None:
        """Lose a chunk.

        Args:
            reason: What the failures of its clients say.
            has_begun: Whether training had begun; if not, the chunk is given to another trainer.
        """
        super().__init__(reason)
        self.has_begun = has_begun


@runtime_checkable
class RemoteTrainer(Protocol):
    """Trains chunks in another process, one at a time."""

    def prepare(self) -> None:
        """Wait until this trainer can take a chunk; raise if it never will."""
        ...

    def train(self, task: TrainTask) -> Iterator[Update | ClientFailure]:
        """Yield the outcome of each client of a task.

        Raises:
            ChunkLostError: If the outcomes end early. Any other error means that this trainer is of no use.
        """
        ...

    def ask(self, task: AskTask) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request, in their order.

        Raises:
            ChunkLostError: If the replies end early.
        """
        ...

    def stop(self) -> None:
        """Drop the task that another thread is having trained or asked."""
        ...

    def close(self) -> None:
        """End for good; another thread may be using this trainer."""
        ...


class TrainerPool:
    """Trainers, the rounds they work for, and the thread of each trainer.

    Attributes:
        condition: Guards everything here and in the rounds; every change notifies it.
        trainers: Those that can be used.
        holders: Client id -> the trainer where it holds what it trained in this round.
        resources: Closed with this pool.
        seconds_here: Time that training has taken in this process.
        has_given_up: Whether a trainer could not be started.
        is_closed: Whether ``close`` has been called.
    """

    def __init__(self) -> None:
        """Start without trainers."""
        self.condition = threading.Condition()
        self.trainers: list[RemoteTrainer] = []
        self.holders: dict[str, RemoteTrainer] = {}
        self.resources = ExitStack()
        self.seconds_here = 0.0
        self.has_given_up = self.is_closed = False
        self._rounds: list[OpenRound] = []
        self._work: dict[RemoteTrainer, tuple[OpenRound, OpenChunk]] = {}
        self._threads: list[threading.Thread] = []

    def add(self, trainer: RemoteTrainer) -> None:
        """Give a trainer its thread, which prepares it as soon as a round is open."""
        thread = threading.Thread(target=self._serve, args=(trainer,), daemon=True)
        with self.condition:
            self.trainers.append(trainer)
            self._threads.append(thread)
        thread.start()

    def give_up(self, reason: str) -> None:
        """Log, the first time, why there are fewer trainers than there should be."""
        if not self.has_given_up and not self.is_closed:
            _log.warning("Training continues in fewer processes, because one could not be started: %s.", reason)
            self.has_given_up = True

    @contextmanager
    def serving(self, work: OpenRound) -> Iterator[None]:
        """Let the trainers work for a round; at the end, stop those that still do."""
        with self.condition:
            self._rounds.append(work)
            self.condition.notify_all()
        try:
            yield
        finally:
            with self.condition:
                self._rounds.remove(work)
                for trainer, (served, chunk) in self._work.items():
                    if served is work and chunk.num_left:
                        trainer.stop()

    def close(self) -> None:
        """End all trainers."""
        with self.condition:
            self.is_closed = True
            for trainer in self.trainers:
                trainer.close()
            self.resources.close()
            self.condition.notify_all()
        # Python would end a thread that still runs at its exit in the middle of native code. The garbage collector may
        # close a pool from one of the threads, which does not wait for the others.
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join(_MOST_SECONDS_TO_END)

    def _serve(self, trainer: RemoteTrainer) -> None:
        """Give a trainer chunk after chunk until the pool is closed or the trainer is of no use."""
        try:
            while self._waited_for_round():
                trainer.prepare()
                self._train_a_chunk(trainer)
        except Exception as error:
            with self.condition:
                self.trainers.remove(trainer)
                self.give_up(str(error))
                self.condition.notify_all()

    def _waited_for_round(self) -> bool:
        """Return True once there is a round, False if the pool is closed first."""
        with self.condition:
            self.condition.wait_for(lambda: self._rounds or self.is_closed)
            return not self.is_closed

    def _train_a_chunk(self, trainer: RemoteTrainer) -> None:
        """Wait for a chunk and let a trainer train it; return early if the pool is closed."""
        with self.condition:
            while (found := self._next_work()) is None:
                if self.is_closed:
                    return
                self.condition.wait()
            work, chunk = self._work[trainer] = found
        try:
            for outcome in trainer.train(work.task(chunk.chunk)):
                with self.condition:
                    if isinstance(outcome, Update) and outcome.is_held:
                        self.holders[str(outcome.client_id)] = trainer
                    work.put(chunk, outcome)
        except Exception as error:
            is_lost = isinstance(error, ChunkLostError)
            with self.condition:
                if chunk.num_left < len(chunk.chunk.clients) or (is_lost and error.has_begun):
                    work.fail(chunk, str(error))
                else:
                    work.give_back(chunk)
            if not is_lost:
                raise
        finally:
            with self.condition:
                del self._work[trainer]

    def _next_work(self) -> tuple[OpenRound, OpenChunk] | None:
        for work in self._rounds:
            if (chunk := work.take(work.can_be_sent)) is not None:
                return work, chunk
        return None


@dataclass(frozen=True, eq=False)
class Dispatcher:
    """Trains cohorts with the trainers of a pool and, in this process, with an engine.

    Attributes:
        engine: How to train.
        pool: The trainers.
        num_threads: CPU threads of this process while it trains.
    """

    engine: SimulationEngine
    pool: TrainerPool
    num_threads: int

    def train(
        self, order: RoundOrder, *, num_processes: int, shares_work: bool, before_chunk: Callable[[], None]
    ) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order, as soon as it is there.

        A caller that stops early, for example because it is interrupted, stops the trainers that are at work.

        Args:
            order: Of the round.
            num_processes: Number of processes that train; limits how many chunks are open.
            shares_work: Whether this process trains as the others do, not only what cannot be sent.
            before_chunk: Called here between chunks.
        """
        pool = self.pool
        work = OpenRound(order, self.engine, pool.condition, _OPEN_CHUNKS * num_processes)

        def accepts(chunk: Chunk) -> bool:
            """Return whether this process trains a chunk."""
            return shares_work or not pool.trainers or not work.can_be_sent(chunk)

        steps: Iterator[bool] | None = None
        with pool.serving(work):
            while True:
                if steps is None:
                    before_chunk()
                with pool.condition:
                    outcome = work.next_outcome()
                    if outcome is None and steps is None:
                        chunk = work.take(accepts)
                        if chunk is not None:
                            steps = self._train_here(work, chunk)
                        elif work.is_over:
                            return
                        else:
                            pool.condition.wait()
                if outcome is not None:
                    yield outcome
                elif steps is not None and not next(steps, False):
                    steps = None

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request, in their order; each is answered where its client trained.

        A caller that is interrupted stops the trainers that are at work.
        """
        parts: dict[RemoteTrainer | None, dict[str, bytes]] = {}
        for client_id, request in requests.items():
            parts.setdefault(self.pool.holders.get(client_id), {})[client_id] = request
        here = self._engine_here.ask(kind, parts.pop(None, {}))
        replies: dict[str, Reply | ClientFailure] = {}
        with ThreadPoolExecutor(max(1, len(parts))) as threads:
            there = {
                trainer: threads.submit(_replies_of, trainer, AskTask(kind, part))
                for trainer, part in parts.items()
                if trainer is not None
            }
            try:
                replies |= {reply.client_id: reply for reply in here}
                for future in there.values():
                    replies |= {reply.client_id: reply for reply in future.result()}
            finally:
                for trainer, future in there.items():
                    if not future.done():
                        trainer.stop()
        yield from (replies[client_id] for client_id in requests)

    def forget(self) -> None:
        """Let all clients drop what they hold."""
        holders, self.pool.holders = set(self.pool.holders.values()), {}
        self._engine_here.forget()
        for trainer in holders:
            _replies_of(trainer, AskTask(None))

    def _train_here(self, work: OpenRound, chunk: OpenChunk) -> Iterator[bool]:
        """Train a chunk in this process, one client at each step of this iterator."""
        self._examples.loaded.update(chunk.chunk.examples)
        outcomes = self._engine_here.train(replace(work.order, cohort=chunk.chunk.clients))
        try:
            while chunk.num_left:
                start = time.perf_counter()
                with _threads(self.num_threads):
                    outcome = next(outcomes)
                self.pool.seconds_here += time.perf_counter() - start
                with self.pool.condition:
                    work.put(chunk, outcome)
                yield True
        finally:
            for client_id in chunk.chunk.examples:
                self._examples.loaded.pop(client_id, None)

    @cached_property
    def _engine_here(self) -> SimulationEngine:
        return replace(self.engine, examples_of=self._examples)

    @cached_property
    def _examples(self) -> "_Examples":
        return _Examples(self.engine.examples_of, self.pool.condition)


def _replies_of(trainer: RemoteTrainer, task: AskTask) -> list[Reply | ClientFailure]:
    """Return the replies of a trainer to a task; those that it loses are failures."""
    replies: list[Reply | ClientFailure] = []
    try:
        replies.extend(trainer.ask(task))
    except ChunkLostError as error:
        lost = list(task.requests.items())[len(replies) :]
        replies += [ClientFailure(one, str(task.kind), str(error), len(request)) for one, request in lost]
    return replies


@dataclass(frozen=True)
class _Examples:
    """The examples of the chunk that this process trains, loaded when it was cut; others are loaded when asked for."""

    load: Callable[[str], Sequence[EncodedExample]]
    condition: threading.Condition
    loaded: dict[str, Sequence[EncodedExample]] = field(default_factory=dict)

    def __call__(self, client_id: str) -> Sequence[EncodedExample]:
        if client_id in self.loaded:
            return self.loaded[client_id]
        # Another thread may be cutting chunks, and a tokenizer serves one thread at a time.
        with self.condition:
            return self.load(client_id)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
