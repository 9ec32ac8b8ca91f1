"""Expected bytes and factors come from encoding and decoding by hand."""

import pytest
import torch

from flexlora.engines import base
from flexlora.engines.base import Parcel
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors
from flexlora.uplink.wire import WireError, decode_broadcast, encode_broadcast

BROADCAST = Broadcast({"layer": LoraFactors(torch.arange(6.0).reshape(2, 3) / 7, torch.ones(4, 2), 2.0)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_parcel_arrives_as_what_its_bytes_decode_to(dtype: str) -> None:
    parcel = Parcel(BROADCAST, dtype)  # type: ignore[arg-type]
    assert parcel.packet == encode_broadcast(BROADCAST, dtype)  # type: ignore[arg-type]
    expected = decode_broadcast(parcel.packet).trainable["layer"]
    assert torch.equal(parcel.arrived.trainable["layer"].A, expected.A)
    assert parcel.arrived.trainable["layer"].A.dtype == getattr(torch, dtype)


def test_a_parcel_is_encoded_and_decoded_once_and_only_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(base, "encode_broadcast", lambda *a: calls.append("encode") or encode_broadcast(*a))
    monkeypatch.setattr(base, "decode_broadcast", lambda *a: calls.append("decode") or decode_broadcast(*a))
    parcel = Parcel(BROADCAST, "float32")
    assert calls == []
    assert all(parcel.packet is parcel.packet and parcel.arrived is parcel.arrived for _ in range(3))
    assert calls == ["encode", "decode"]


def test_a_parcel_that_has_travelled_goes_on_as_the_bytes_it_came_as(monkeypatch: pytest.MonkeyPatch) -> None:
    packet = encode_broadcast(BROADCAST, "float32")
    monkeypatch.setattr(base, "encode_broadcast", None)
    monkeypatch.setattr(base, "decode_broadcast", None)
    parcel = Parcel(BROADCAST, "float32", packet)
    assert parcel.packet is packet and parcel.arrived is BROADCAST


def test_a_broadcast_that_cannot_be_encoded_is_told_of_whenever_its_bytes_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(broadcast: Broadcast, dtype: str) -> bytes:
        raise WireError("too large")

    monkeypatch.setattr(base, "encode_broadcast", refuse)
    parcel = Parcel(BROADCAST, "float32")
    for _ in range(2):
        with pytest.raises(WireError, match="too large"):
            _ = parcel.packet
