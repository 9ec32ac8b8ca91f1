"""Messages that break a rule are refused by name; norms and limits are computed by hand."""

from dataclasses import replace

import pytest
import torch

from flexlora.errors import FlexLoraError
from flexlora.federation.known_rows import known_rows, mask_of
from flexlora.federation.message_checks import BroadcastError, UpdateError, check_broadcast, check_update
from flexlora.federation.messages import Broadcast, ClientFailure, SparseMask, TailPenalty, Update
from flexlora.lora.factors import LoraFactors, Scaling

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


def check(update: dict[str, LoraFactors], dtype: str = "float32") -> None:
    check_update(Update("a", update, 1.0), Broadcast(adapter(seed=5)), SHAPES, dtype)


def as_type(factors: dict[str, LoraFactors], dtype: torch.dtype) -> dict[str, LoraFactors]:
    return {module: one.to(dtype) for module, one in factors.items()}


def test_a_sound_update_passes():
    check(as_type(adapter(), torch.bfloat16))


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(factor, bad):
    update = adapter()
    getattr(update["layers.10.down_proj"], factor)[1, 1] = bad
    with pytest.raises(UpdateError, match=rf"^layers\.10\.down_proj: {factor} must be finite; got 1 NaN"):
        check(update)


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
        check(of_size(A, B))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_largest_change_is_the_root_of_what_the_wire_can_hold(dtype, share):
    limit = torch.finfo(DTYPES[dtype]).max ** 0.5
    out_features, in_features = SHAPES[LARGE]
    # Both columns of B are equal and so are the rows of A: ||s B A|| = s * rank * A * B * sqrt(out * in).
    value = (share * limit / (SCALING(2) * 2 * (out_features * in_features) ** 0.5)) ** 0.5
    if share < 1:
        check(of_size(value, value), dtype)
    else:
        with pytest.raises(UpdateError, match=f"the norm of the change .* {dtype}"):
            check(of_size(value, value), dtype)


def test_factors_that_cancel_are_judged_by_their_change():
    update = of_size(1.0, 1e12)
    update[LARGE].B[:, 1] *= -1
    update[LARGE].A.mul_(1e8)
    check(update)


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
            r"layers\.0\.q_proj: scaling must be 0\.0333.*, as it was sent; got 1\.0",
        ),
    ],
    ids=["missing", "surplus", "rank", "shape", "scaling"],
)
def test_an_update_that_was_not_asked_for_is_refused_by_name(change, message):
    update = adapter()
    change(update)
    with pytest.raises(UpdateError, match=message):
        check(update)


def test_errors_are_of_the_common_base_and_value_errors():
    for error in (BroadcastError, UpdateError):
        assert issubclass(error, FlexLoraError)
        assert issubclass(error, ValueError)


def cores(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {module: torch.full((one.rank, one.rank), value) for module, one in adapter().items()}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"layers\.0\.q_proj: a core of shape \(3, 3\) must be returned; got none"),
        ({**cores(), "layers.10.down_proj": torch.ones(3, 3)}, r"down_proj: a core of shape \(2, 2\).*got \(3, 3\)"),
        (
            {**cores(), "layers.10.down_proj": torch.full((2, 2), torch.nan)},
            "down_proj: core must be finite; got 4 NaN",
        ),
        (cores(1e25), "q_proj: the norm of core must be below"),
        (cores(1e18), None),
    ],
    ids=["none", "shape", "nan", "huge", "large"],
)
def test_cores_are_checked_as_factors_are(returned, message):
    sent = Broadcast(adapter(), train_factors="core", cores=cores())
    update = Update("a", sent.trainable, 1.0, cores=returned)
    if message is None:
        check_update(update, sent, SHAPES)
    else:
        with pytest.raises(UpdateError, match=message):
            check_update(update, sent, SHAPES)


def test_the_change_that_a_core_makes_is_judged_with_it():
    # At float16, ||s B R A|| must be below 255.9: here it is 0.05 * 2 * 2 * sqrt(4 * 7) * B * R * A.
    ones = LoraFactors(torch.ones(2, 7), torch.ones(4, 2), 0.05)
    sent = Broadcast({"m": ones}, train_factors="core", cores={"m": torch.eye(2)})
    limit = 65504**0.5 / (0.05 * 4 * 28**0.5)
    for share in (0.99, 1.01):
        update = Update("a", {"m": ones}, 1.0, cores={"m": torch.full((2, 2), share * limit)})
        if share < 1:
            check_update(update, sent, {"m": (4, 7)}, "float16")
        else:
            with pytest.raises(UpdateError, match=r"the norm of the change must be below 255\.9"):
                check_update(update, sent, {"m": (4, 7)}, "float16")


RANKS = {"layers.0.q_proj": 3, "layers.10.down_proj": 2}
KNOWN = {
    module: LoraFactors(known_rows(7, module, 3, SHAPES[module][1]), torch.zeros(SHAPES[module][0], 3), 1.0)
    for module in SHAPES
}
MASK = SparseMask(0.3, 1)
MASKED = {
    module: LoraFactors(torch.eye(shape[1]), mask_of(MASK, module, shape).float(), 1.0)
    for module, shape in SHAPES.items()
}


@pytest.mark.parametrize(
    ("broadcast", "ranks", "fewer"),
    [
        (Broadcast(adapter()), RANKS, False),
        (Broadcast(adapter()), dict.fromkeys(RANKS, 3), True),
        (Broadcast(adapter(), train_factors="core", cores=cores()), RANKS, False),
        (Broadcast(adapter(), kept="B"), RANKS, False),
        (Broadcast(KNOWN, known_A=7), dict.fromkeys(RANKS, 3), False),
        (Broadcast(MASKED, train_factors="B", known_A="identity", mask=MASK), RANKS, False),
        (Broadcast(adapter(), tail_penalty=TailPenalty(0.1, 0.5)), RANKS, False),
    ],
    ids=["plain", "fewer", "core", "kept", "known", "masked", "tail"],
)
def test_sound_broadcasts_pass(broadcast, ranks, fewer):
    check_broadcast(broadcast, ranks, fewer_directions=fewer)


@pytest.mark.parametrize(
    ("broadcast", "ranks", "fewer", "message"),
    [
        (Broadcast(adapter()), {"layers.0.q_proj": 3}, False, r"modules of a broadcast must be .*; got"),
        (Broadcast(adapter()), dict.fromkeys(RANKS, 3), False, "down_proj: the rank of a broadcast must be 3,.*got 2"),
        (Broadcast(adapter()), dict.fromkeys(RANKS, 2), True, r"q_proj: the rank of a broadcast must be 1\.\.2.*got 3"),
        (Broadcast(adapter(), train_factors="core"), RANKS, False, "cores must be there.*'core' and no cores"),
        (Broadcast(adapter(), cores=cores()), RANKS, False, "only then; got train_factors 'both' and cores of"),
        (
            Broadcast(adapter(), train_factors="core", cores=dict.fromkeys(cores(), torch.eye(3))),
            RANKS,
            False,
            r"down_proj: the core must have shape \(2, 2\); got \(3, 3\)",
        ),
        (Broadcast(adapter(), train_factors="A", kept="B"), RANKS, False, "keeps B must train both"),
        (Broadcast(MASKED, mask=MASK), RANKS, False, "train_factors must be 'B'; got 'both'"),
        (Broadcast(MASKED, None, "B", mask=SparseMask(0.3, 2)), RANKS, False, "B must be zero outside the mask"),
        (Broadcast(KNOWN, known_A=8), dict.fromkeys(RANKS, 3), False, r"A must be known_rows\(8"),
        (Broadcast(adapter(), tail_penalty=TailPenalty(-1.0, 0.5)), RANKS, False, "tail penalty needs.*got -1.0 and"),
        (
            Broadcast(adapter(), train_factors="core", cores=cores(), tail_penalty=TailPenalty(1.0, 0.5)),
            RANKS,
            False,
            "the tail penalty is about A and B",
        ),
    ],
)
def test_a_broadcast_that_contradicts_itself_is_refused_with_the_rule(broadcast, ranks, fewer, message):
    with pytest.raises(BroadcastError, match=message):
        check_broadcast(broadcast, ranks, fewer_directions=fewer)
