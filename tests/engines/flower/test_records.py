"""Envelopes in Flower's records: small payloads beside their header, large ones as an array."""

import pytest
from flwr.app import ConfigRecord

from flexlora.engines.flower.envelope import Envelope, EnvelopeError
from flexlora.engines.flower.records import FACTORS, HEADER, MOST_BYTES_BESIDE, from_records, to_records


@pytest.mark.parametrize("size", [0, 1, MOST_BYTES_BESIDE, MOST_BYTES_BESIDE + 1])
def test_what_is_put_in_comes_out(size: int) -> None:
    sent = Envelope("train", {"server_round": 3}, bytes(size))
    records = to_records(sent)
    assert (FACTORS in records) == (size > MOST_BYTES_BESIDE)
    found = from_records(records)
    assert (found.kind, found.fields, found.payload) == (sent.kind, sent.fields, sent.payload)


def test_a_payload_that_is_no_bytes_is_refused() -> None:
    records = to_records(Envelope("train"))
    records[HEADER] = ConfigRecord({"header": records.config_records[HEADER]["header"], "factors": "text"})
    with pytest.raises(EnvelopeError, match="must be bytes"):
        from_records(records)
