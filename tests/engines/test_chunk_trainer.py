import dataclasses

import pytest
import torch

from flexlora.engines.chunk_trainer import packed, pickled_order, unpacked
from flexlora.federation.messages import ClientFailure, Update
from flexlora.lora.factors import LoraFactors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_is_unpacked_as_it_was_packed(dtype):
    generator = torch.Generator().manual_seed(0)
    factors = LoraFactors(
        torch.randn(2, 3, generator=generator).to(dtype), torch.randn(4, 2, generator=generator).to(dtype), 0.5
    )
    update = Update("ann", {"layer": factors}, 3.0, {"loss": 1.5}, up_bytes=10, down_bytes=20, train_seconds=0.25)
    found = unpacked(packed(update))
    assert dataclasses.replace(found, payload={}) == dataclasses.replace(update, payload={})
    assert found.payload.keys() == {"layer"}
    assert found.payload["layer"].scaling == 0.5
    for name in ("A", "B"):
        factor, expected = getattr(found.payload["layer"], name), getattr(factors, name)
        assert factor.dtype == dtype and torch.equal(factor, expected)


def test_a_failure_is_unpacked_as_it_was_packed():
    failure = ClientFailure("bob", "train", "boom", 7)
    assert unpacked(packed(failure)) == failure


def test_an_order_is_pickled_without_clients_and_broadcasts(order_of):
    whole = pickled_order(order_of(2, [object()] * 3, {}))
    assert whole == pickled_order(order_of(2, [], {}))
