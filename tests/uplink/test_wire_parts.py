"""What the other end does not have travels, and nothing else; sizes are counted by hand."""

import dataclasses
import zlib

import pytest
import torch

from flexlora.federation.known_rows import known_rows, mask_of
from flexlora.federation.message_checks import check_update
from flexlora.federation.messages import Broadcast, SparseMask, TailPenalty, Update
from flexlora.lora.factors import LoraFactors
from flexlora.uplink.wire import (
    WireDtype,
    WireError,
    decode_broadcast,
    decode_update,
    encode,
    encode_broadcast,
    encode_update,
    received_update,
    update_size,
)

SHAPES = {"attn.q_proj": (6, 9), "mlp.down_proj": (4, 7)}
RANKS = {"attn.q_proj": 3, "mlp.down_proj": 2}
WIDTHS: dict[WireDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
MASK = SparseMask(0.3, 5)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(seed: int = 0, ranks: dict[str, int] = RANKS) -> dict[str, LoraFactors]:
    return {
        module: LoraFactors(
            randn(ranks[module], wide, seed=seed), randn(high, ranks[module], seed=seed + 1), 0.1 + ranks[module]
        )
        for module, (high, wide) in SHAPES.items()
    }


def known(seed: int) -> dict[str, LoraFactors]:
    return {
        module: LoraFactors(known_rows(seed, module, one.rank, one.shape[1]), one.B, one.scaling)
        for module, one in factors().items()
    }


def masked() -> dict[str, LoraFactors]:
    return {
        module: LoraFactors(torch.eye(shape[1]), randn(*shape, seed=1) * mask_of(MASK, module, shape), 1.0)
        for module, shape in SHAPES.items()
    }


def cores(seed: int) -> dict[str, torch.Tensor]:
    return {module: randn(rank, rank, seed=seed) for module, rank in RANKS.items()}


# Values of A: 3 * 9 + 2 * 7, of B: 6 * 3 + 4 * 2, of cores: 9 + 4, of the mask: round(0.3 * 54) + round(0.3 * 28).
A, B, CORE, CHOSEN = 41, 26, 13, 16 + 8
KINDS: dict[str, tuple[Broadcast, int, int]] = {
    "both": (Broadcast(factors()), A + B, A + B),
    "A": (Broadcast(factors(), train_factors="A"), A + B, A),
    "B": (Broadcast(factors(), train_factors="B"), A + B, B),
    "core": (Broadcast(factors(), train_factors="core", cores=cores(3)), A + B + CORE, CORE),
    "kept": (Broadcast(factors(), kept="B"), A + B, A),
    "known": (Broadcast(known(11), train_factors="B", known_A=11), B, B),
    "known core": (Broadcast(known(0), train_factors="core", cores=cores(3), known_A=0), B + CORE, CORE),
    "restarted": (Broadcast(known(4), frozen=factors(8), known_A=4), A + 2 * B, A + B),
    "masked": (Broadcast(masked(), train_factors="B", known_A="identity", mask=MASK), CHOSEN, CHOSEN),
    "tail": (Broadcast(factors(), tail_penalty=TailPenalty(0.01, 0.99)), A + B, A + B),
}
by_kind = pytest.mark.parametrize("kind", KINDS)
by_dtype = pytest.mark.parametrize("dtype", WIDTHS)


def values_in(data: bytes, dtype: WireDtype) -> float:
    """Return how many values a safetensors file holds behind its header, whose length its first 8 bytes give."""
    return (len(data) - 8 - int.from_bytes(data[:8], "little")) / WIDTHS[dtype]


def trained(sent: Broadcast) -> Update:
    """Return what a client has afterwards: everything has moved that may have."""
    new_cores = None if sent.cores is None else cores(21)
    ranks = {module: one.rank for module, one in sent.trainable.items()}
    payload = {
        module: LoraFactors(one.A, one.B, sent.trainable[module].scaling) for module, one in factors(20, ranks).items()
    }
    return Update("a", payload, 3.0, {"loss": 1.0}, cores=new_cores)


def assert_same(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@by_kind
@by_dtype
def test_a_broadcast_arrives_whole_with_its_instruction(kind: str, dtype: WireDtype) -> None:
    sent, num_values, _ = KINDS[kind]
    data = encode_broadcast(sent, dtype)
    assert values_in(data, dtype) == num_values
    found = decode_broadcast(data)
    for name in ("train_factors", "kept", "known_A", "mask", "tail_penalty"):
        assert getattr(found, name) == getattr(sent, name)
    wire = getattr(torch, dtype)
    for module, one in sent.trainable.items():
        # A client makes a known A itself, and needs no rounding for that.
        assert_same(found.trainable[module].A, one.A, wire if sent.known_A is None else torch.float32)
        assert_same(found.trainable[module].B, one.B, wire)
        assert found.trainable[module].scaling == one.scaling
    assert (found.cores is None) == (sent.cores is None)
    for module, core in (sent.cores or {}).items():
        assert_same((found.cores or {})[module], core, wire)
    assert (found.frozen is None) == (sent.frozen is None)


@by_kind
@by_dtype
def test_only_what_was_trained_and_is_not_kept_travels_back_and_the_rest_is_put_back(
    kind: str, dtype: WireDtype
) -> None:
    broadcast, _, num_values = KINDS[kind]
    sent = decode_broadcast(encode_broadcast(broadcast, dtype))
    update, wire = trained(sent), getattr(torch, dtype)
    data = encode_update(update, sent, dtype)
    assert values_in(data, dtype) == num_values
    found = decode_update(data, update, sent)
    for module, one in update.payload.items():
        own, got = sent.trainable[module], found.payload[module]
        moves_A = sent.train_factors in ("both", "A") and sent.kept != "A"
        moves_B = sent.train_factors in ("both", "B") and sent.kept != "B"
        chosen = mask_of(MASK, module, SHAPES[module]) if sent.mask is not None else torch.ones_like(one.B)
        assert torch.equal(got.A, one.A.to(wire) if moves_A else own.A)
        assert torch.equal(got.B, (one.B * chosen).to(wire) if moves_B else own.B)
        assert got.scaling == own.scaling
    assert (found.cores is None) == (sent.cores is None)
    for module, core in (update.cores or {}).items():
        assert_same((found.cores or {})[module], core, wire)
    assert found.up_bytes == len(data) and found.weight == 3.0
    check_update(found, sent, SHAPES, dtype)


@by_kind
@by_dtype
def test_what_is_received_without_bytes_is_what_comes_out_of_them(kind: str, dtype: WireDtype) -> None:
    sent = decode_broadcast(encode_broadcast(KINDS[kind][0], dtype))
    update = trained(sent)
    data = encode_update(update, sent, dtype)
    arrived, expected = received_update(update, sent, dtype), decode_update(data, update, sent)
    assert arrived.up_bytes == update_size(None, sent, dtype) == len(data)
    for module, one in expected.payload.items():
        got = arrived.payload[module]
        assert_same(got.A, one.A, one.A.dtype)
        assert_same(got.B, one.B, one.B.dtype)
        assert got.scaling == one.scaling
    assert (arrived.cores or {}).keys() == (expected.cores or {}).keys()
    for module, core in (expected.cores or {}).items():
        assert_same((arrived.cores or {})[module], core, core.dtype)


def test_ordinary_messages_keep_their_bytes() -> None:
    # Checksums of what version 0.1.0 wrote.
    def one(rank: int, scaling: float) -> LoraFactors:
        return LoraFactors(
            torch.arange(rank * 5.0).view(rank, 5) / 7, torch.arange(3.0 * rank).view(3, rank) - 2, scaling
        )

    adapter, frozen = {"b": one(2, 0.1), "a": one(1, 16.0)}, {"c": one(3, 1.0)}
    broadcasts = [Broadcast(adapter), Broadcast(adapter, frozen, "A"), Broadcast(adapter, {}, "B")]
    for dtype, expected in (
        ("float32", [1427697374, 2827827335, 1967943152, 3399505849]),
        ("bfloat16", [1908583615, 4161344667, 1109859359, 2689507710]),
    ):
        update = Update("a", adapter, 1.0)
        data = [encode(adapter, dtype), *(encode_broadcast(broadcast, dtype) for broadcast in broadcasts)]
        assert encode_update(update, broadcasts[0], dtype) == data[0]
        assert [zlib.crc32(one) for one in data] == expected


@by_kind
def test_equal_content_gives_equal_bytes_whatever_its_order(kind: str) -> None:
    sent = KINDS[kind][0]
    turned = dataclasses.replace(
        sent,
        trainable=dict(reversed(sent.trainable.items())),
        cores=None if sent.cores is None else dict(reversed(sent.cores.items())),
    )
    assert encode_broadcast(sent, "float32") == encode_broadcast(turned, "float32")


def test_a_module_that_was_not_asked_for_reaches_the_check_as_it_is() -> None:
    sent = Broadcast(factors(), train_factors="B")
    odd = {**factors(2), "extra": factors(2)["attn.q_proj"]}
    odd["mlp.down_proj"] = LoraFactors(torch.ones(5, 7), torch.ones(4, 5), 1.0)
    found = received_update(Update("a", odd, 1.0), sent, "float32")
    assert torch.equal(found.payload["extra"].A, odd["extra"].A)
    assert found.payload["mlp.down_proj"].rank == 5


@pytest.mark.parametrize("kind", ["B", "core", "masked", "kept"])
def test_an_update_that_does_not_fit_what_was_sent_is_refused_on_arrival(kind: str) -> None:
    sent = KINDS[kind][0]
    update = trained(sent)
    other = {module: one.truncate(1) for module, one in update.payload.items()}
    new_cores = None if update.cores is None else {module: core[:1, :1] for module, core in update.cores.items()}
    shrunk = dataclasses.replace(update, payload=other, cores=new_cores)
    if kind == "kept":
        shrunk = dataclasses.replace(update, payload=update.payload | {"extra": factors(9)["attn.q_proj"]})
    with pytest.raises(WireError, match="the payload must hold"):
        decode_update(encode_update(shrunk, sent, "float32"), update, sent)
    bare = encode_update(dataclasses.replace(update, payload={}, cores=None), sent, "float32")
    assert decode_update(bare, update, sent).payload == {}


def test_a_broadcast_of_unknown_fields_is_refused() -> None:
    sent = dataclasses.replace(KINDS["known"][0], known_A="zeros")  # type: ignore[arg-type]
    with pytest.raises(WireError):
        decode_broadcast(encode_broadcast(sent, "float32"))
