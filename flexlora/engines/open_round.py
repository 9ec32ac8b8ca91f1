"""Keeps the state of a round in training: which chunks are assigned, and which outcomes wait for earlier ones."""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from flexlora.engines.base import RoundOrder
from flexlora.engines.chunk_trainer import TrainTask, pickled_order, pickled_settings
from flexlora.engines.chunks import Chunk, cut_into_chunks
from flexlora.engines.simulation import SimulationEngine
from flexlora.federation.messages import ClientFailure, Update

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class OpenChunk:
    """A chunk in training.

    Attributes:
        chunk: The chunk.
        num_left: Number of clients whose outcomes are still to come.
        outcomes: Those that wait until the outcomes of all earlier clients have been yielded.
    """

    chunk: Chunk
    num_left: int
    outcomes: deque[Update | ClientFailure] = field(default_factory=deque)


class OpenRound:
    """A round in training. Callers hold ``condition``; every change notifies it."""

    _numbers = itertools.count()

    def __init__(
        self, order: RoundOrder, engine: SimulationEngine, condition: threading.Condition, most_open: int
    ) -> None:
        """Cut nothing yet.

        Args:
            order: Of the round.
            engine: How to train.
            condition: Guards this round.
            most_open: Most chunks that may be cut while outcomes of theirs are still to be taken.
        """
        self.order = order
        self._number, self._engine = next(self._numbers), engine
        self._condition, self._most_open = condition, most_open
        model = engine.model
        self._chunks = cut_into_chunks(
            order.cohort, engine.examples_of, engine.settings, model.device.type, model.num_parameters
        )
        self._is_cut = False
        # In cohort order.
        self._open: deque[OpenChunk] = deque()
        self._unassigned: list[OpenChunk] = []

    @property
    def is_over(self) -> bool:
        """Whether every outcome has been taken."""
        return self._is_cut and not self._open

    def next_outcome(self) -> Update | ClientFailure | None:
        """Take the next outcome in cohort order, or return None if it has not come yet."""
        while self._open and not self._open[0].outcomes and not self._open[0].num_left:
            self._open.popleft()
            self._condition.notify_all()
        return self._open[0].outcomes.popleft() if self._open and self._open[0].outcomes else None

    def take(self, accepts: Callable[[Chunk], bool]) -> OpenChunk | None:
        """Take a chunk that ``accepts`` allows; None if there is none, or too many are open."""
        for candidate in self._unassigned:
            if accepts(candidate.chunk):
                self._unassigned.remove(candidate)
                return candidate
        while len(self._open) < self._most_open:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._is_cut = True
                return None
            self._open.append(OpenChunk(chunk, len(chunk.clients)))
            if accepts(chunk):
                return self._open[-1]
            self.give_back(self._open[-1])
        return None

    def put(self, chunk: OpenChunk, outcome: Update | ClientFailure) -> None:
        """Add the next outcome of a chunk."""
        chunk.outcomes.append(outcome)
        chunk.num_left -= 1
        self._condition.notify_all()

    def give_back(self, chunk: OpenChunk) -> None:
        """Return a chunk whose training has not begun."""
        self._unassigned.append(chunk)
        self._condition.notify_all()

    def fail(self, chunk: OpenChunk, reason: str) -> None:
        """Add a failure for each client of a chunk whose outcome is missing."""
        clients = chunk.chunk.clients
        for client in clients[len(clients) - chunk.num_left :]:
            down_bytes = len(self.order.parcel_of(client).packet)
            self.put(chunk, ClientFailure(client.client_id, "train", reason, down_bytes))

    def can_be_sent(self, chunk: Chunk) -> bool:
        """Return whether a trainer could be sent all it needs; if not, clients fail here, with the reason."""
        if self._pickled is None or len(chunk.examples) < len(chunk.clients):
            return False
        try:
            return all(self.order.parcel_of(client).packet for client in chunk.clients)
        except Exception:
            return False

    def task(self, chunk: Chunk) -> TrainTask:
        """Return a chunk as a task, with the packets of all its clients."""
        assert self._pickled is not None
        order, engine = self._pickled
        return TrainTask(
            call=self._number,
            clients=chunk.clients,
            examples={client_id: list(examples) for client_id, examples in chunk.examples.items()},
            packets={self.order.key_of(client): self.order.parcel_of(client).packet for client in chunk.clients},
            kept={one.client_id: kept for one in chunk.clients if (kept := self.order.kept.get(one.client_id))},
            order=order,
            engine=engine,
        )

    @cached_property
    def _pickled(self) -> tuple[bytes, bytes] | None:
        try:
            return pickled_order(self.order), pickled_settings(self._engine)
        except Exception as error:
            _log.warning("Clients train in one process, because the training cannot be pickled: %s.", error)
            return None
