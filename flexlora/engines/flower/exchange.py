"""Sends messages over a Grid and collects what comes back, without ever holding more than a few replies.

Replies wait at the SuperLink until they are asked for. Flower's own loop asks for all of them every three seconds; this
one asks for a few at a time, often.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from flexlora.engines.flower.envelope import Envelope, EnvelopeError
from flexlora.engines.flower.records import from_records, to_records
from flexlora.text import printable

MOST_HELD = 4
"""Most replies that are here at once."""

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.02, 0.25
# Names of flwr's error codes for people.
_FAULTS: Mapping[int, str] = {
    1: "its ClientApp could not be loaded",
    2: "its ClientApp raised an error",
    3: "the message was no longer at the SuperLink",
    4: "its reply did not reach the SuperLink in time",
    5: "its SuperNode is gone: it was stopped or lost its connection",
    6: "a mod of its ClientApp refused the message",
    7: "its SuperNode could not read the app",
    8: "its ClientApp stopped working",
}


@dataclass(frozen=True)
class Fault:
    """What came instead of a reply.

    Attributes:
        stage: As in ``ClientFailure``.
        reason: One line for a person.
    """

    stage: str
    reason: str


def send(
    grid: Grid, node_id: int, request: Envelope, group: str, seconds: float | None, factors: ArrayRecord | None = None
) -> str:
    """Send a request to a node and return the id of its message.

    Args:
        grid: Of the run.
        node_id: The receiver.
        request: What it is asked.
        group: Shown by Flower's own displays; the round.
        seconds: After which Flower drops the message; None leaves Flower's 12 hours.
        factors: The payload as a record, if several messages share it.

    Raises:
        EnvelopeError: If the SuperLink does not take it.
    """
    kind = "query" if request.kind == "describe" else "train"
    message = Message(to_records(request, factors), node_id, kind, group_id=group, ttl=seconds)
    (sent,) = tuple(grid.push_messages([message])) or (None,)
    if not sent:
        raise EnvelopeError(f"the SuperLink did not take a message of {len(request.payload):,} bytes; see its log")
    return sent


def replies_in_order(grid: Grid, message_ids: Sequence[str], ends: float | None) -> Iterator[Envelope | Fault]:
    """Yield what came back for each message, in the order of the messages.

    Args:
        grid: Of the run.
        message_ids: What ``send`` returned.
        ends: When (``time.monotonic``) to give up those that have not come; None waits for all.
    """
    waiting, held, pause = deque(message_ids), dict[str, Envelope | Fault](), _SHORTEST_PAUSE
    while waiting:
        is_over = ends is not None and time.monotonic() >= ends
        window = list(islice(waiting, MOST_HELD))
        found = pulled(grid, [one for one in window if one not in held])
        held |= found
        for one in window:
            if one not in held and not is_over:
                break
            waiting.popleft()
            yield held.pop(one, None) or Fault("stale", "its reply did not come before the deadline of the round")
        pause = _SHORTEST_PAUSE if found else min(2 * pause, _LONGEST_PAUSE)
        if waiting and not found and not is_over:
            time.sleep(pause)


def replies_as_they_come(
    grid: Grid, message_ids: Sequence[str], ends: float | None
) -> Iterator[tuple[str, Envelope | Fault]]:
    """Yield message id and what came back for it, as it comes; those that have not come by ``ends`` are left out.

    Args:
        grid: Of the run.
        message_ids: What ``send`` returned.
        ends: When (``time.monotonic``) to stop; None waits for all.
    """
    waiting, pause = dict.fromkeys(message_ids), _SHORTEST_PAUSE
    while waiting:
        is_over = ends is not None and time.monotonic() >= ends
        asked = list(waiting)
        for first in range(0, len(asked), MOST_HELD):
            found = pulled(grid, asked[first : first + MOST_HELD])
            while found:
                message_id, reply = found.popitem()
                del waiting[message_id]
                yield message_id, reply
        if is_over:
            return
        pause = _SHORTEST_PAUSE if len(waiting) < len(asked) else min(2 * pause, _LONGEST_PAUSE)
        if waiting:
            time.sleep(pause)


def pulled(grid: Grid, message_ids: Sequence[str]) -> dict[str, Envelope | Fault]:
    """Return what has come back for some messages, by their ids; a second reply to a message is dropped."""
    found: dict[str, Envelope | Fault] = {}
    for reply in grid.pull_messages(message_ids) if message_ids else ():
        # The sender of an error may be the SuperLink, so only what it answers tells whom it is about.
        answered = reply.metadata.reply_to_message_id
        if answered in message_ids and answered not in found:
            found[answered] = _content(reply)
    return found


def _content(reply: Message) -> Envelope | Fault:
    if reply.has_error():
        what = _FAULTS.get(reply.error.code, f"Flower reported error {reply.error.code}")
        detail = printable(" ".join((reply.error.reason or "").split()))
        return Fault("train", f"{what} ({detail:.200})" if detail else what)
    if not reply.has_content():
        return Fault("validate", "its reply is empty")
    try:
        return from_records(reply.content)
    except EnvelopeError as error:
        return Fault("validate", str(error))
