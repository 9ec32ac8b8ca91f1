import json
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from flexlora import FlexLoraError
from flexlora.aggregators.registry import AGGREGATORS
from flexlora.federation.messages import Broadcast, ClientFailure, Update
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.uplink.wire import (
    UpdateError,
    WireError,
    check_update,
    decode,
    decode_broadcast,
    encode,
    encode_broadcast,
    encoded_size,
    received,
)

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


RANKS = {"layers.0.q_proj": 3, "layers.10.down_proj": 2}


def test_a_sound_update_passes():
    check_update(decode(encode(adapter(), "bfloat16")), RANKS, SHAPES, SCALING)


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(factor, bad):
    update = adapter()
    getattr(update["layers.10.down_proj"], factor)[1, 1] = bad
    with pytest.raises(UpdateError, match=rf"^layers\.10\.down_proj: {factor} must be finite; got 1 NaN"):
        check_update(update, RANKS, SHAPES, SCALING)


LARGE = "layers.10.down_proj"


def of_size(A: float, B: float, rank: int = 2) -> dict[str, LoraFactors]:
    """Return a sound update but for one module, whose factors are constant."""
    out_features, in_features = SHAPES[LARGE]
    large = LoraFactors(torch.full((rank, in_features), A), torch.full((out_features, rank), B), SCALING(rank))
    return {**adapter(), LARGE: large}


@pytest.mark.parametrize(
    ("A", "B", "what"),
    [(1e25, 1e25, "A"), (1e25, 0.0, "A"), (0.0, 1e25, "B"), (1e15, 1e15, "the change"), (3e38, 1e-38, "A")],
)
def test_finite_values_that_the_next_broadcast_could_not_hold_are_named(A, B, what):
    with pytest.raises(
        UpdateError, match=rf"^layers\.10\.down_proj: the norm of {what} must be below 1\.8\d*e\+19.*; got "
    ):
        check_update(of_size(A, B), RANKS, SHAPES, SCALING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_largest_change_is_the_root_of_what_the_wire_can_hold(dtype, share):
    limit = torch.finfo(DTYPES[dtype]).max ** 0.5
    out_features, in_features = SHAPES[LARGE]
    # Both columns of B are equal and so are the rows of A: ||s B A|| = s * rank * A * B * sqrt(out * in).
    value = (share * limit / (SCALING(2) * 2 * (out_features * in_features) ** 0.5)) ** 0.5
    if share < 1:
        check_update(of_size(value, value), RANKS, SHAPES, SCALING, dtype)
    else:
        with pytest.raises(UpdateError, match=f"the norm of the change .* {dtype}"):
            check_update(of_size(value, value), RANKS, SHAPES, SCALING, dtype)


def test_factors_that_cancel_are_judged_by_their_change():
    update = of_size(1.0, 1e12)
    update[LARGE].B[:, 1] *= -1
    update[LARGE].A.mul_(1e8)
    check_update(update, RANKS, SHAPES, SCALING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["fedit", "zero_pad", "flexlora"])
def test_what_passes_can_be_broadcast_again(method, dtype):
    scaling = Scaling("constant_alpha", 1.0)
    limit = torch.finfo(DTYPES[dtype]).max ** 0.5
    start = {"m": LoraFactors(torch.ones(4, 7), torch.zeros(4, 4), scaling(4))}
    value = (0.99 * limit / 28**0.5) ** 0.5  # rank 4 at scaling 1/4: the norm is A * B * sqrt(28)
    update = {"m": LoraFactors(torch.full((4, 7), value), torch.full((4, 4), value), scaling(4))}
    # 16 entries of B, 28 of A.
    check_update(update, {"m": 4}, {"m": (4, 7)}, scaling, dtype)
    aggregator = AGGREGATORS[method](scaling=scaling)
    state = aggregator.init(start)
    for _ in range(3):
        state = aggregator.aggregate(state, [Update("large", update, 1.0), Update("again", update, 2.0)])
        update = decode_broadcast(encode_broadcast(aggregator.broadcast(state, {"m": 4}), dtype)).trainable
        assert all(factor.isfinite().all() for factor in (update["m"].A, update["m"].B))


def test_a_refused_update_can_be_recorded_with_the_bytes_that_travelled():
    assert ClientFailure("a", "validate", "reason", 10, 20).up_bytes == 20
    assert ClientFailure("a", "train", "reason").up_bytes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u.pop("layers.0.q_proj"), r"layers\.0\.q_proj: .* missing"),
        (lambda u: u.update(extra=u["layers.0.q_proj"]), "extra: .* surplus"),
        (lambda u: u.update(adapter({"layers.0.q_proj": 4})), r"layers\.0\.q_proj: rank must be 3.* got 4"),
        (
            lambda u: u.update({"layers.0.q_proj": replace(u["layers.0.q_proj"], A=torch.ones(3, 8))}),
            r"layers\.0\.q_proj: B @ A must have shape \(6, 9\); got B \(6, 3\), A \(3, 8\)",
        ),
        (
            lambda u: u.update({"layers.0.q_proj": replace(u["layers.0.q_proj"], scaling=1.0)}),
            r"layers\.0\.q_proj: scaling must be 0\.0333.*constant_alpha at rank 3.*got 1\.0",
        ),
    ],
    ids=["missing", "surplus", "rank", "shape", "scaling"],
)
def test_an_update_that_was_not_asked_for_is_refused_by_name(change, message):
    update = adapter()
    change(update)
    with pytest.raises(UpdateError, match=message):
        check_update(update, RANKS, SHAPES, SCALING)


def test_errors_are_of_the_common_base_and_value_errors():
    for error in (WireError, UpdateError):
        assert issubclass(error, FlexLoraError)
        assert issubclass(error, ValueError)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_received_without_bytes_is_what_comes_out_of_them(dtype):
    generator = torch.Generator().manual_seed(0)
    adapter = {
        "b": LoraFactors(torch.randn(6, 3, generator=generator).T, torch.randn(5, 3, generator=generator), 1 / 3),
        "a": LoraFactors(
            torch.randn(2, 4, generator=generator).double(), torch.randn(7, 2, generator=generator).double(), 2.0
        ),
    }
    data = encode(adapter, dtype)
    arrived, expected = received(adapter, dtype), decode(data)
    assert encoded_size(arrived, dtype) == len(data)
    assert list(arrived) == list(expected)
    for module, factors in expected.items():
        assert arrived[module].scaling == factors.scaling
        for name in "AB":
            assert torch.equal(getattr(arrived[module], name), getattr(factors, name))
            assert getattr(arrived[module], name).dtype == getattr(factors, name).dtype
