import pytest
import torch

from flexlora.uplink.blob import WireError
from flexlora.uplink.phase_messages import (
    bytes_by_client,
    bytes_in,
    clients_in,
    fields_and_tensors,
    in_hex,
    message,
    number_in,
)


def test_a_message_is_read_as_it_was_written():
    fields, tensors = fields_and_tensors(message({"sum": 1, "names": ["a"]}, {"words": torch.arange(3)}))
    assert fields == {"names": ["a"], "sum": 1} and torch.equal(tensors["words"], torch.arange(3))


def test_bytes_travel_as_digits():
    fields = in_hex({"b": b"\x01\xff", "a": b""})
    assert fields == {"a": "", "b": "01ff"}
    assert bytes_by_client({"x": fields}, "x") == {"a": b"", "b": b"\x01\xff"}
    assert bytes_in({"x": "01ff"}, "x", 2) == b"\x01\xff"


@pytest.mark.parametrize(
    "read",
    [
        lambda: bytes_in({}, "x"),
        lambda: bytes_in({"x": "01"}, "x", 2),
        lambda: bytes_in({"x": "0g"}, "x"),
        lambda: bytes_by_client({"x": ["00"]}, "x"),
        lambda: bytes_by_client({"x": {"a": 3}}, "x"),
        lambda: clients_in({"x": "a"}, "x"),
        lambda: clients_in({"x": ["a", "a"]}, "x"),
        lambda: clients_in({"x": ["a", 1]}, "x"),
        lambda: number_in({"x": 3}, "x", 0, 2),
        lambda: number_in({"x": True}, "x", 0, 2),
        lambda: number_in({"x": 1.0}, "x", 0, 2),
        lambda: fields_and_tensors(b"damaged"),
    ],
)
def test_what_a_message_does_not_hold_is_refused(read):
    with pytest.raises(WireError):
        read()
