"""Compressed updates: right in the mean as products, of the stated size, nothing lost over rounds with feedback."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexlora.federation.known_rows import mask_of
from flexlora.federation.message_checks import UpdateError, check_update
from flexlora.federation.messages import Broadcast, SparseMask, Update
from flexlora.lora.factors import LoraFactors
from flexlora.uplink.compression import Compression, compressed, compressed_size, read_compressed
from flexlora.uplink.wire import WireError, encode_update

SHAPES = {"layers.0.q_proj": (6, 9), "layers.10.down_proj": (150, 7)}
RANKS = {"layers.0.q_proj": 3, "layers.10.down_proj": 2}
HOW = [Compression(8), Compression(4), Compression(8, True), Compression(4, True)]


def factors(seed: int, size: float = 1.0) -> dict[str, LoraFactors]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            size * torch.randn(RANKS[name], width, generator=rng),
            size * torch.randn(height, RANKS[name], generator=rng),
            2.0,
        )
        for name, (height, width) in SHAPES.items()
    }


def moved(start: dict[str, LoraFactors], seed: int, size: float = 0.1) -> dict[str, LoraFactors]:
    steps = factors(seed, size)
    return {name: LoraFactors(own.A + steps[name].A, own.B + steps[name].B, 2.0) for name, own in start.items()}


def product(own: LoraFactors) -> np.ndarray:
    return own.scaling * own.B.double().numpy() @ own.A.double().numpy()


def arrive(update: Update, sent: Broadcast, how: Compression, seed: int = 0, kept=None) -> Update:
    data, _ = compressed(update, sent, how, np.random.default_rng(seed), kept)
    return read_compressed(data, update, sent, how)


@pytest.mark.parametrize("how", HOW)
def test_an_update_arrives_close_to_what_it_was_in_the_bytes_announced(how):
    sent = Broadcast(factors(0))
    update = Update("c", moved(sent.trainable, 1), 5.0, {"loss": 1.0})
    data, _ = compressed(update, sent, how, np.random.default_rng(3))
    assert len(data) == compressed_size(sent, how)
    found = read_compressed(data, update, sent, how)
    assert (found.up_bytes, found.weight, found.metrics) == (len(data), 5.0, {"loss": 1.0})
    check_update(found, sent, SHAPES)
    for name, own in update.payload.items():
        for part in ("A", "B"):
            change = getattr(own, part) - getattr(sent.trainable[name], part)
            error = getattr(found.payload[name], part) - getattr(own, part)
            assert error.abs().max() <= change.abs().max() / (2 ** (how.bits - 1) - 1) * 1.001


def test_eight_bits_take_a_quarter_of_float32_and_four_an_eighth():
    wide = {"m": LoraFactors(torch.zeros(16, 4096), torch.zeros(4096, 16), 1.0)}
    sent = Broadcast(wide)
    whole = len(encode_update(Update("c", wide, 1.0), sent, "float32"))
    assert compressed_size(sent, Compression(8)) / whole == pytest.approx(1 / 4 + 1 / 128, rel=0.01)
    assert compressed_size(sent, Compression(4)) / whole == pytest.approx(1 / 8 + 1 / 128, rel=0.01)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_product_is_right_in_the_mean(bits):
    sent = Broadcast(factors(0))
    update = Update("c", moved(sent.trainable, 1, 0.5), 1.0)
    rng, number = np.random.default_rng(5), 1500
    total = {name: [] for name in SHAPES}
    for _ in range(number):
        data, _ = compressed(update, sent, Compression(bits), rng)
        found = read_compressed(data, update, sent, Compression(bits))
        for name, own in found.payload.items():
            total[name].append(product(own))
    for name, draws in total.items():
        errors = np.mean(draws, axis=0) - product(update.payload[name])
        standard = np.std(draws, axis=0) / number**0.5
        # 1,104 entries: five standard errors leave out less than one in a thousand repetitions.
        assert (np.abs(errors) <= 5 * standard + 1e-6).all()


def test_with_feedback_the_sum_of_what_arrives_is_the_sum_of_what_was_trained_but_for_what_is_remembered():
    sent, how, kept = Broadcast(factors(0)), Compression(4, True), None
    true = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    arrived = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for number in range(6):
        # Another broadcast each round, in other coordinates.
        sent = Broadcast(factors(100 + number))
        update = Update("c", moved(sent.trainable, 200 + number), 1.0)
        data, kept = compressed(update, sent, how, np.random.default_rng(number), kept)
        found = read_compressed(data, update, sent, how)
        for name in SHAPES:
            true[name] += product(update.payload[name])
            arrived[name] += product(found.payload[name])
            left = kept[f"residual/{name}.B"].double().numpy() @ kept[f"residual/{name}.A"].double().numpy()
            if name == "layers.0.q_proj":  # Rank 6 of 6: nothing is cut off here.
                assert np.allclose(true[name] - arrived[name], left, atol=1e-4)
            assert kept[f"residual/{name}.A"].shape[0] <= 2 * RANKS[name]


def test_feedback_lowers_the_error_of_the_mean_over_rounds_of_a_client_that_comes_back():
    def error(how: Compression) -> float:
        total, kept = {name: np.zeros(shape) for name, shape in SHAPES.items()}, None
        sent = Broadcast(factors(0))
        update = Update("c", moved(sent.trainable, 1), 1.0)
        for number in range(20):
            data, kept = compressed(update, sent, how, np.random.default_rng(number), kept)
            for name, own in read_compressed(data, update, sent, how).payload.items():
                total[name] += product(own) / 20
        return sum(float(np.linalg.norm(total[name] - product(update.payload[name])) ** 2) for name in SHAPES) ** 0.5

    assert error(Compression(4, True)) < 0.5 * error(Compression(4))


def test_memory_is_added_by_least_squares_in_the_directions_that_are_trained():
    sent, how = Broadcast(factors(0)), Compression(8, True)
    memory = factors(7)
    kept = {f"residual/{name}.{part}": getattr(one, part) for name, one in memory.items() for part in ("A", "B")}
    update = Update("c", moved(sent.trainable, 1), 1.0)
    found = arrive(update, sent, how, kept=kept)
    plain = arrive(update, sent, replace(how, error_feedback=False))
    for name, own in update.payload.items():
        A = own.A.double().numpy()
        more = memory[name].B.double().numpy() @ memory[name].A.double().numpy()
        expected = np.linalg.lstsq(A.T, more.T, rcond=None)[0].T / own.scaling
        got = (found.payload[name].B - plain.payload[name].B).double().numpy()
        # To a step of the grid for each of the two.
        assert np.abs(got - expected).max() <= 2 * (np.abs(expected).max() + 0.5) / 127


@pytest.mark.parametrize("condition", [1, 100, 1000])
def test_what_is_remembered_does_not_grow_however_parallel_the_rows_of_A_are(condition):
    rank, height, width, how, kept = 8, 96, 128, Compression(4, True), None
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1.0, 1.0 / condition, rank)
    errors = []
    for number in range(25):
        rows = np.linalg.qr(rng.normal(size=(width, rank)))[0].T
        mixing = np.linalg.qr(rng.normal(size=(rank, rank)))[0]
        A = torch.from_numpy((mixing * sizes) @ rows).float()
        start = {"m": LoraFactors(A, torch.zeros(height, rank), 1.0)}
        B = torch.from_numpy(rng.normal(size=(height, rank))).float()
        update = Update("c", {"m": LoraFactors(A, B, 1.0)}, 1.0)
        data, kept = compressed(update, Broadcast(start), how, np.random.default_rng(number), kept)
        arrived = product(read_compressed(data, update, Broadcast(start), how).payload["m"])
        errors.append(
            np.linalg.norm(arrived - product(update.payload["m"])) / np.linalg.norm(product(update.payload["m"]))
        )
    # The error of one rounding is 0.16 of the change; what is added of the last one is about as large.
    assert max(errors) < 0.5


def test_memory_that_is_not_finite_is_forgotten():
    sent, how = Broadcast(factors(0)), Compression(4, True)
    memory = {f"residual/{name}.{part}": getattr(one, part) for name, one in factors(1).items() for part in ("A", "B")}
    memory["residual/layers.0.q_proj.A"][0, 0] = float("inf")
    update = Update("c", moved(sent.trainable, 1), 1.0)
    data, remembered = compressed(update, sent, how, np.random.default_rng(0), memory)
    assert data == compressed(update, sent, how, np.random.default_rng(0))[0]
    assert all(one.isfinite().all() for one in remembered.values())
    huge = Update("c", {name: LoraFactors(1e20 * own.A, 1e20 * own.B, 2.0) for name, own in factors(2).items()}, 1.0)
    _, remembered = compressed(huge, sent, how, np.random.default_rng(0))
    assert all(one.isfinite().all() for one in remembered.values())


@pytest.mark.parametrize("trains", ["A", "B"])
def test_only_what_was_trained_travels_and_the_rest_is_as_it_was_sent(trains):
    sent = Broadcast(factors(0), train_factors=trains)
    update = Update("c", moved(sent.trainable, 1), 1.0)
    for how in HOW:
        found = arrive(update, sent, how)
        for name, own in sent.trainable.items():
            other = "B" if trains == "A" else "A"
            assert torch.equal(getattr(found.payload[name], other), getattr(own, other))
        assert len(compressed(update, sent, how, np.random.default_rng(0))[0]) == compressed_size(sent, how)


def test_cores_travel_alone():
    cores = {name: torch.eye(rank) for name, rank in RANKS.items()}
    sent = Broadcast(factors(0), train_factors="core", cores=cores)
    trained = {name: core + 0.1 * torch.randn(core.shape) for name, core in cores.items()}
    update = Update("c", sent.trainable, 1.0, cores=trained)
    for how in HOW:
        found = arrive(update, sent, how)
        assert found.cores is not None
        for name, core in trained.items():
            assert (found.cores[name] - core).abs().max() < 0.1
            assert torch.equal(found.payload[name].A, sent.trainable[name].A)


def test_of_a_masked_B_the_chosen_entries_travel_alone():
    mask = SparseMask(0.25, 3)
    start = {
        name: LoraFactors(own.A, own.B * mask_of(mask, name, tuple(own.B.shape)), 2.0)
        for name, own in factors(0).items()
    }
    sent = Broadcast(start, train_factors="B", mask=mask)
    update = Update("c", moved(start, 1), 1.0)
    found = arrive(update, sent, Compression(8, True))
    for name, own in found.payload.items():
        chosen = mask_of(mask, name, tuple(own.B.shape))
        assert not own.B[~chosen].any()
        assert torch.allclose(own.B[chosen], update.payload[name].B[chosen], atol=0.01)
        assert len(compressed(update, sent, Compression(8), np.random.default_rng(0))[0]) == compressed_size(
            sent, Compression(8)
        )


def test_what_is_kept_by_its_client_does_not_travel():
    sent = Broadcast(factors(0), kept="B")
    update = Update("c", moved(sent.trainable, 1), 1.0)
    data, remembered = compressed(update, sent, Compression(8, True), np.random.default_rng(0))
    assert remembered == {}
    found = read_compressed(data, update, sent, Compression(8, True))
    for name, own in found.payload.items():
        assert torch.equal(own.B, sent.trainable[name].B)


def test_what_was_sent_in_bfloat16_comes_back_as_changes_of_that():
    start = {name: own.to(torch.bfloat16) for name, own in factors(0).items()}
    sent = Broadcast(start)
    update = Update("c", moved({n: own.to(torch.float32) for n, own in start.items()}, 1), 1.0)
    found = arrive(update, sent, Compression(8))
    for name, own in found.payload.items():
        assert own.A.dtype == own.B.dtype == torch.float32
        assert (own.A - update.payload[name].A).abs().max() < 0.3 / 127


@pytest.mark.parametrize("how", HOW)
def test_an_update_that_is_not_finite_is_left_for_the_server_to_refuse(how):
    sent = Broadcast(factors(0))
    payload = moved(sent.trainable, 1)
    payload["layers.0.q_proj"].A[0, 0] = float("nan")
    data, remembered = compressed(Update("c", payload, 1.0), sent, how, np.random.default_rng(0))
    assert remembered == {}
    with pytest.raises(UpdateError, match="A must be finite"):
        check_update(read_compressed(data, Update("c", {}, 1.0), sent, how), sent, SHAPES)


def test_payloads_that_do_not_fit_are_refused_by_name():
    sent, how = Broadcast(factors(0)), Compression(8)
    update = Update("c", moved(sent.trainable, 1), 1.0)
    data, _ = compressed(update, sent, how, np.random.default_rng(0))
    with pytest.raises(WireError, match="4 bits a number was expected; got 8"):
        read_compressed(data, update, sent, Compression(4))
    with pytest.raises(WireError, match="got whole numbers"):
        read_compressed(encode_update(update, sent, "float32"), update, sent, how)
    with pytest.raises(WireError, match="altered"):
        read_compressed(data[:-1] + bytes([data[-1] ^ 1]), update, sent, how)
    less = Broadcast({"layers.0.q_proj": sent.trainable["layers.0.q_proj"]})
    with pytest.raises(WireError, match="surplus"):
        read_compressed(data, update, less, how)
    smaller = {name: own.truncate(1) for name, own in sent.trainable.items()}
    with pytest.raises(WireError, match="codes and scales of A"):
        read_compressed(data, update, Broadcast(smaller), how)
    with pytest.raises(WireError, match="in the shapes that were sent"):
        compressed(Update("c", smaller, 1.0), sent, how, np.random.default_rng(0))


def test_rounding_depends_on_the_generator_alone():
    sent = Broadcast(factors(0))
    update = Update("c", moved(sent.trainable, 1), 1.0)
    first, again, other = (compressed(update, sent, HOW[1], np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert first == again != other
