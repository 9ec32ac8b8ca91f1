"""Puts envelopes into Flower's records and takes them out again.

Whatever has to be exact travels as bytes: the header as one text, all factors together as one array whose content is a
safetensors blob. Flower's own tensor path knows no bfloat16, and each array of a message costs two transfers a hop.
"""

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from flexlora.engines.flower.envelope import Envelope, EnvelopeError, from_header, header_of

HEADER, FACTORS = "flexlora", "factors"
"""Names of the records in a message."""

_TEXT, _ARRAY, _STORED_AS = "header", "factors", "safetensors"


def factors_record(payload: bytes) -> ArrayRecord:
    """Return a payload as a record, which several messages may share: it then reaches the SuperLink once."""
    return ArrayRecord({_ARRAY: Array("uint8", (len(payload),), _STORED_AS, payload)})


def to_records(envelope: Envelope, factors: ArrayRecord | None = None) -> RecordDict:
    """Return an envelope as the content of a message.

    Args:
        envelope: Its payload is left out if it is empty.
        factors: What ``factors_record`` made of the same payload.
    """
    records = RecordDict({HEADER: ConfigRecord({_TEXT: header_of(envelope)})})
    if envelope.payload:
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
    return from_header(text, _payload(records))


def _payload(records: RecordDict) -> bytes:
    factors = records.array_records.get(FACTORS)
    if factors is None:
        return b""
    array = factors.get(_ARRAY)
    if array is None or len(factors) != 1 or array.stype != _STORED_AS:
        raise EnvelopeError(f"all factors of a message must be one array, stored as {_STORED_AS}; got {len(factors)}")
    return array.data
