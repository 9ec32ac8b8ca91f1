import json
import subprocess
import sys
import zlib

import pytest
import safetensors.torch
import torch

from flexlora.aggregators.registry import AGGREGATORS
from flexlora.federation.message_checks import check_update
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.uplink.wire import WireError, decode, decode_broadcast, encode, encode_broadcast

SHAPES = {"layers.0.q_proj": (6, 9), "layers.10.down_proj": (4, 7)}
SCALING = Scaling("constant_alpha", 0.1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def adapter(ranks: dict[str, int] | None = None, seed: int = 0) -> dict[str, LoraFactors]:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, SHAPES[module][1], generator=rng),
            torch.randn(SHAPES[module][0], rank, generator=rng),
            SCALING(rank),
        )
        for module, rank in (ranks or {"layers.0.q_proj": 3, "layers.10.down_proj": 2}).items()
    }


def assert_same(found, expected, dtype: torch.dtype) -> None:
    assert list(found) == sorted(expected)
    for module, factors in expected.items():
        assert torch.equal(found[module].A, factors.A.to(dtype))
        assert torch.equal(found[module].B, factors.B.to(dtype))
        assert found[module].scaling == factors.scaling


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_arrives_as_it_left(dtype):
    sent = adapter()
    assert_same(decode(encode(sent, dtype)), sent, DTYPES[dtype])


def test_scalings_read_back_exactly():
    for scaling in (0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, 16.0):
        sent = {"m": LoraFactors(torch.ones(1, 1), torch.ones(1, 1), scaling)}
        assert decode(encode(sent, "float32"))["m"].scaling == scaling


def test_slices_transposes_and_graphs_travel_too():
    wide = torch.randn(7, 4, requires_grad=True)
    sent = {"m": LoraFactors(wide.T[:3], wide[:, :3], 1.0)}
    assert_same(decode(encode(sent, "float32")), {"m": sent["m"].to(torch.float32)}, torch.float32)


def test_the_bytes_are_a_safetensors_file_of_the_size_that_was_announced():
    sent = adapter()
    data = encode(sent, "bfloat16")
    tensors = safetensors.torch.load(data)
    assert set(tensors) == {f"adapter/{module}.{name}" for module in SHAPES for name in "AB"}
    num_values = sum(factors.A.numel() + factors.B.numel() for factors in sent.values())
    assert num_values * 2 < len(data) < num_values * 2 + 1000


def test_equal_content_gives_equal_bytes_whatever_its_order():
    sent = adapter()
    turned = dict(reversed(sent.items()))
    assert encode(sent, "float32") == encode(turned, "float32")
    broadcast = Broadcast(sent, adapter(seed=1), "A")
    again = Broadcast(turned, dict(reversed(adapter(seed=1).items())), "A")
    assert encode_broadcast(broadcast, "float16") == encode_broadcast(again, "float16")


def test_the_bytes_do_not_change_from_process_to_process():
    program = (
        "import torch, zlib; from flexlora.lora.factors import LoraFactors; from flexlora.uplink.wire import encode;"
        "print(zlib.crc32(encode({m: LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 0.1) for m in 'zyx'}, 'float32')))"
    )
    here = zlib.crc32(encode({m: LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 0.1) for m in "xyz"}, "float32"))
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(there.stdout) == here


@pytest.mark.parametrize("train_factors", ["both", "A", "B"])
@pytest.mark.parametrize("frozen", [None, {}, adapter({"layers.0.q_proj": 5}, seed=1)], ids=["none", "empty", "one"])
def test_a_broadcast_arrives_with_its_branches_and_its_instruction(frozen, train_factors):
    sent = Broadcast(adapter(), frozen, train_factors)
    found = decode_broadcast(encode_broadcast(sent, "float32"))
    assert_same(found.trainable, sent.trainable, torch.float32)
    assert found.train_factors == train_factors
    assert (found.frozen is None) == (frozen is None)
    if frozen is not None:
        assert_same(found.frozen, frozen, torch.float32)


def test_a_payload_cut_anywhere_is_refused():
    data = encode(adapter(), "float32")
    for length in [*range(0, len(data), 13), len(data) - 1]:
        with pytest.raises(WireError, match=f"payload of {length} bytes"):
            decode(data[:length])


def test_a_flipped_bit_anywhere_is_refused():
    data = encode(adapter(), "float32")
    for position in range(0, len(data), 5):
        altered = bytearray(data)
        altered[position] ^= 4
        with pytest.raises(WireError, match="altered"):
            decode(bytes(altered))


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04 not factors", safetensors.torch.save({"x": torch.ones(2)})], ids=["empty", "zip", "bare"]
)
def test_other_files_are_refused(data):
    with pytest.raises(WireError, match="not written by flexlora"):
        decode(data)


def test_one_kind_of_message_is_not_taken_for_the_other():
    with pytest.raises(WireError, match="adapter was expected"):
        decode(encode_broadcast(Broadcast(adapter()), "float32"))
    with pytest.raises(WireError, match="broadcast was expected"):
        decode_broadcast(encode(adapter(), "float32"))


def test_factors_that_do_not_fit_together_are_refused_on_arrival():
    tensors = {"adapter/m.A": torch.ones(2, 3), "adapter/m.B": torch.ones(4, 5)}
    content = {"version": 1, "scalings": {"adapter": {"m": 1.0}}, "fields": {}}
    checksum = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    for name, tensor in tensors.items():
        checksum = zlib.crc32(f"{name} torch.float32 {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
    metadata = {"flexlora": json.dumps({**content, "checksum": f"{checksum:08x}"})}
    with pytest.raises(WireError, match="m: the payload must hold A"):
        decode(safetensors.torch.save(tensors, metadata))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["fedit", "zero_pad", "flexlora"])
def test_what_passes_can_be_broadcast_again(method, dtype):
    scaling = Scaling("constant_alpha", 1.0)
    limit = torch.finfo(DTYPES[dtype]).max ** 0.5
    start = {"m": LoraFactors(torch.ones(4, 7), torch.zeros(4, 4), scaling(4))}
    value = (0.99 * limit / 28**0.5) ** 0.5  # rank 4 at scaling 1/4: the norm is A * B * sqrt(28)
    update = {"m": LoraFactors(torch.full((4, 7), value), torch.full((4, 4), value), scaling(4))}
    # 16 entries of B, 28 of A.
    check_update(Update("large", update, 1.0), Broadcast(start), {"m": (4, 7)}, dtype)
    aggregator = AGGREGATORS[method](scaling=scaling)
    state = aggregator.init(start)
    for _ in range(3):
        state = aggregator.aggregate(state, [Update("large", update, 1.0), Update("again", update, 2.0)])
        update = decode_broadcast(encode_broadcast(aggregator.broadcast(state, {"m": 4}), dtype)).trainable
        assert all(factor.isfinite().all() for factor in (update["m"].A, update["m"].B))
