"""Serves a server as one of its clients: connects, answers what it asks, connects again when the connection is lost."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message

from flexlora.engines.flower.envelope import Envelope, EnvelopeError, from_bytes, to_bytes
from flexlora.engines.flower.node import Connection, Place
from flexlora.engines.flower.records import from_records, to_records
from flexlora.engines.flower.refusals import LostError, RunOverError, UnknownKeyError
from flexlora.engines.flower.resident import Answer, ResidentError
from flexlora.errors import FlexLoraError

_SHORTEST_PAUSE, _LONGEST_PAUSE, _PAUSE_GROWTH = 0.03, 0.25, 1.3
_LONGEST_CONNECT_PAUSE = 2.0
# A key that was made a moment ago is known to the server a moment later.
_SECONDS_FOR_A_NEW_KEY = 5.0
_SECONDS_TO_BE_HEARD = 2.0
_SECONDS_BETWEEN_RUN_LOOKS = 1.0

_NOTHING = Envelope("")

_log = logging.getLogger(__name__)


class TakesNoPartError(FlexLoraError, ValueError):
    """A client that cannot take part in the run of its server: other base model, no rank that fits, no data."""


@dataclass(frozen=True)
class News:
    """Something that a client's user wants to know.

    Attributes:
        what: What happened.
        asked: The request that it is about, without its payload.
        replied: The reply, without its payload.
        seconds: How long the answer took.
        down_bytes: Length of the request.
        up_bytes: Length of the reply.
        reason: Why the connection is lost.
    """

    what: Literal["waiting", "connected", "lost", "asked", "answered", "over"]
    asked: Envelope = _NOTHING
    replied: Envelope = _NOTHING
    seconds: float = 0.0
    down_bytes: int = 0
    up_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ClientLoop:
    """One client of a server.

    Attributes:
        place: The server.
        answer: Request to reply.
        notify: Told what happens.
        remember: Told the number that Flower gave this client, for ``earlier_node`` after it was killed.
        wait_seconds: How long to try to reach a server that does not answer, unless it ``stays``.
        stays: Whether to wait for another run when one is over, and for its server however long that takes.
    """

    place: Place
    answer: Answer
    notify: Callable[[News], None]
    remember: Callable[[int], None] = lambda node_id: None
    wait_seconds: float = 300.0
    stays: bool = False

    def run(self, earlier_node: int = 0) -> None:
        """Answer until the run is over.

        Args:
            earlier_node: What ``remember`` was told before this client was killed; 0 if it was not.

        Raises:
            RefusedError: If the server does not let this client in.
            LostError: If the server does not answer for too long.
            TakesNoPartError: If this client cannot take part; the server has been told.
        """
        connection = Connection(self.place)
        try:
            self._connect(connection, earlier_node)
            while True:
                try:
                    self._serve(connection)
                    return
                except LostError as error:
                    _log.info("Lost: %s", error)
                    self.notify(News("lost", reason=str(error)))
                    self._connect(connection, connection.node_id)
        finally:
            connection.close()

    def _connect(self, connection: Connection, earlier_node: int) -> None:
        begin, pause = time.monotonic(), _SHORTEST_PAUSE
        while True:
            try:
                connection.connect(earlier_node)
                break
            except (LostError, UnknownKeyError) as error:
                waited = time.monotonic() - begin
                is_key = isinstance(error, UnknownKeyError)
                patience = math.inf if self.stays else self.wait_seconds
                if waited > (_SECONDS_FOR_A_NEW_KEY if is_key else patience):
                    raise
                if not is_key:
                    self.notify(News("waiting", reason=str(error)))
                time.sleep(pause)
                pause = min(_LONGEST_CONNECT_PAUSE, 2 * pause)
        self.remember(connection.node_id)
        self.notify(News("connected"))

    def _serve(self, connection: Connection) -> None:
        """Answer until a run that this client was asked about is over."""
        run_id, looked, pause = 0, time.monotonic(), _SHORTEST_PAUSE
        while True:
            is_over = False
            try:
                message = connection.receive()
                if message is not None:
                    run_id, pause, looked = message.metadata.run_id, _SHORTEST_PAUSE, time.monotonic()
                    self._reply(connection, message)
                    continue
                if run_id and time.monotonic() - looked > _SECONDS_BETWEEN_RUN_LOOKS:
                    is_over, looked = connection.run_is_over(run_id), time.monotonic()
            except RunOverError:
                is_over = True
            if is_over:
                self.notify(News("over"))
                if not self.stays:
                    return
                run_id = 0
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, _PAUSE_GROWTH * pause)

    def _reply(self, connection: Connection, message: Message) -> None:
        begin = time.monotonic()
        try:
            asked = from_records(message.content)
            request = to_bytes(asked)
        except EnvelopeError as error:
            failure = Envelope("failure", {"stage": "refused", "reason": str(error)})
            connection.reply(message, to_records(failure), 0.0)
            return
        headline = Envelope(asked.kind, asked.fields)
        self.notify(News("asked", headline, down_bytes=len(request)))
        try:
            reply = self.answer(request)
            replied = from_bytes(reply)
        except (ResidentError, EnvelopeError) as error:
            fields = {name: asked.fields.get(name) for name in ("client_id", "server_round")}
            run = asked.fields.get("run")
            fields["run_id"] = run.get("run_id") if isinstance(run, dict) else None
            replied = Envelope("failure", {**fields, "stage": "train", "reason": str(error)})
            reply = to_bytes(replied)
        seconds = time.monotonic() - begin
        connection.reply(message, to_records(replied), seconds)
        told = Envelope(replied.kind, replied.fields)
        self.notify(News("answered", headline, told, seconds, len(request), len(reply)))
        if asked.kind == "describe" and replied.kind == "failure":
            # The SuperLink drops the reply of a client that leaves before the server has taken it.
            time.sleep(_SECONDS_TO_BE_HEARD)
            raise TakesNoPartError(str(replied.fields.get("reason")))
