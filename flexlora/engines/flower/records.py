"""Puts envelopes into Flower's records and takes them out again.

Whatever has to be exact travels as bytes: the header as one text, all factors together as one safetensors blob.
Flower's own tensor path knows no bfloat16, and each object in a message costs requests on every hop: a blob that is not
large stands beside the header, a large one is an array, which Flower cuts into pieces and sends once to all who share
it.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.typing import ConfigRecordValues

from flexlora.engines.flower.envelope import Envelope, EnvelopeError, from_header, header_of

HEADER, FACTORS = "flexlora", "factors"
"""Names of the records in a message."""

_TEXT, _ARRAY, _STORED_AS, _BLOB = "header", "factors", "safetensors", "factors"

MOST_BYTES_BESIDE = 1 << 21
"""The longest payload that stands beside its header."""


def factors_record(payload: bytes) -> ArrayRecord:
    """Return a payload as a record, which several messages may share: it then reaches the SuperLink once."""
    return ArrayRecord({_ARRAY: Array("uint8", (len(payload),), _STORED_AS, payload)})


def to_records(envelope: Envelope, factors: ArrayRecord | None = None) -> RecordDict:
    """Return an envelope as the content of a message.

    Args:
        envelope: Its payload is left out if it is empty.
        factors: What ``factors_record`` made of the same payload; needed only if it is large.
    """
    content: dict[str, ConfigRecordValues] = {_TEXT: header_of(envelope)}
    is_beside = bool(envelope.payload) and len(envelope.payload) <= MOST_BYTES_BESIDE
    if is_beside:
        content[_BLOB] = envelope.payload
    records = RecordDict({HEADER: ConfigRecord(content)})
    if envelope.payload and not is_beside:
        records[FACTORS] = factors_record(envelope.payload) if factors is None else factors
    return records


def from_records(records: RecordDict) -> Envelope:
    """Return the envelope in the content of a message.

    Raises:
        EnvelopeError: If ``to_records`` did not write it.
    """
    header = records.config_records.get(HEADER)
    text = None if header is None else header.get(_TEXT)
    if not isinstance(text, bytes):
        raise EnvelopeError(f"a message must hold the record {HEADER!r}; this one holds {sorted(records)[:5]}")
    beside = header.get(_BLOB, b"") if header is not None else b""
    if not isinstance(beside, bytes):
        raise EnvelopeError("the payload of a message must be bytes")
    return from_header(text, beside or _payload(records))


def _payload(records: RecordDict) -> bytes:
    factors = records.array_records.get(FACTORS)
    if factors is None:
        return b""
    array = factors.get(_ARRAY)
    if array is None or len(factors) != 1 or array.stype != _STORED_AS:
        raise EnvelopeError(f"all factors of a message must be one array, stored as {_STORED_AS}; got {len(factors)}")
    return array.data
