"""Packs a request or a reply into bytes: a small header of plain values, and one payload such as factors.

Nothing here knows Flower: the same bytes pass through a Flower message, a socket or a file.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexlora.errors import FlexLoraError
from flexlora.foreign import ForeignError, read_json

# Magic and version, length of the header in bytes.
_PREFIX = struct.Struct("<4sI")
_MAGIC = b"FLE1"

MOST_HEADER_BYTES = 4_000_000
"""A header holds settings and names, never tensors."""


class EnvelopeError(FlexLoraError, ValueError):
    """Bytes that are no request or reply, or one that says something else than it has to."""


@dataclass(frozen=True, eq=False)
class Envelope:
    """A request or a reply.

    Attributes:
        kind: What is asked for (``describe``, ``train``) or answered (``description``, ``update``, ``failure``).
        fields: Plain JSON values.
        payload: Bytes that travel as they are; empty without tensors.
    """

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes = b""

    def text(self, name: str) -> str:
        """Return a field that must be a text.

        Raises:
            EnvelopeError: If it is none.
        """
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise EnvelopeError(f"{self.kind}: {name} must be a text; got {value!r:.60}")
        return value

    def number(self, name: str) -> float:
        """Return a field that must be a number.

        Raises:
            EnvelopeError: If it is none.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise EnvelopeError(f"{self.kind}: {name} must be a number; got {value!r:.60}")
        return value

    def whole(self, name: str) -> int:
        """Return a field that must be a whole number of at least 0.

        Raises:
            EnvelopeError: If it is none.
        """
        value = self.fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise EnvelopeError(f"{self.kind}: {name} must be a whole number of at least 0; got {value!r:.60}")
        return value


def header_of(envelope: Envelope) -> bytes:
    """Return kind and fields of an envelope as JSON."""
    return json.dumps({"kind": envelope.kind, "fields": dict(envelope.fields)}, sort_keys=True).encode()


def from_header(header: bytes, payload: bytes) -> Envelope:
    """Return the envelope with this header and payload.

    Raises:
        EnvelopeError: If the header is not what ``header_of`` writes.
    """
    if len(header) > MOST_HEADER_BYTES:
        raise EnvelopeError(
            f"the header of a message must have at most {MOST_HEADER_BYTES:,} bytes; got {len(header):,}"
        )
    try:
        content = read_json(header, "the header of a message", unique_keys=True)
    except ForeignError as error:
        raise EnvelopeError(str(error)) from error
    kind, fields = (content.get("kind"), content.get("fields")) if isinstance(content, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(fields, dict):
        raise EnvelopeError("the header of a message must hold its kind and its fields; this one was written by others")
    return Envelope(kind, fields, payload)


def to_bytes(envelope: Envelope) -> bytes:
    """Return an envelope as bytes."""
    header = header_of(envelope)
    return b"".join((_PREFIX.pack(_MAGIC, len(header)), header, envelope.payload))


def from_bytes(data: bytes) -> Envelope:
    """Return the envelope that ``to_bytes`` wrote.

    Raises:
        EnvelopeError: If ``data`` was cut off or written by something else.
    """
    if len(data) < _PREFIX.size or data[:4] != _MAGIC:
        raise EnvelopeError(f"a message must begin with {_MAGIC!r}; got {len(data)} bytes that begin {data[:8]!r}")
    _, size = _PREFIX.unpack_from(data)
    start = _PREFIX.size + size
    if start > len(data):
        raise EnvelopeError(f"a message must hold its whole header of {size:,} bytes; got {len(data):,} bytes in all")
    return from_header(data[_PREFIX.size : start], data[start:])
