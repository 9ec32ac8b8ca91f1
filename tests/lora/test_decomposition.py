"""Expected values come from numpy: a dense float64 sum and numpy.linalg.svd."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexlora.lora import decomposition, subspace
from flexlora.lora.certificate import FLOOR, TOLERANCE
from flexlora.lora.factors import LoraFactors
from flexlora.lora.linalg import DecompositionError
from flexlora.lora.operator import Operator
from flexlora.lora.product import (
    ProductError,
    ProductSum,
    add_product,
    certified_decomposition,
    certified_decompositions,
)

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(90, 80), (80, 100), (84, 84), (240, 72)]


@pytest.fixture
def small_sides_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets sizes at which tests are quick take the ways meant for large ones."""
    monkeypatch.setattr(decomposition, "SMALL_SIDE", 8)
    monkeypatch.setattr(subspace, "LEAST_OVERSAMPLING", 12)
    monkeypatch.setattr(decomposition, "_products_worth", lambda *_: float(subspace.MOST_PRODUCTS))


def matrix_of(S: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    U = np.linalg.qr(rng.standard_normal((shape[0], len(S))))[0]
    V = np.linalg.qr(rng.standard_normal((shape[1], len(S))))[0]
    return U * S, V.T


def spectrum_values(kind: str, side: int, k: int, rng: np.random.Generator) -> np.ndarray:
    index = np.arange(side)
    return {
        "decaying": np.exp(-index / rng.uniform(1, side)),
        "graded": np.geomspace(1, 1e-7, side),
        "flat": np.ones(side),
        "step": np.where(index < k, 1.0, rng.uniform(0.001, 0.99)),
        "late step": np.where(index < min(side - 1, k + 3), 1.0, 1e-3),
        "low rank": np.where(index < max(1, k // 2), 1.0, 0.0),
        "one": np.where(index < 1, 1.0, 1e-4 * rng.random(side)),
    }[kind]


KINDS = ["decaying", "graded", "flat", "step", "late step", "low rank", "one"]


def split_into_clients(
    left: np.ndarray, right: np.ndarray, num: int, rng: np.random.Generator, dtype: torch.dtype
) -> list[tuple[LoraFactors, float]]:
    """Return clients whose sum is near ``left @ right``: each has some columns, some of them twice, signs included."""
    clients = []
    for _ in range(num):
        columns = rng.permutation(left.shape[1])[: int(rng.integers(1, left.shape[1] + 1))]
        noise = 10.0 ** rng.uniform(-8, -1)
        B = left[:, columns] * (1 + noise * rng.standard_normal(len(columns)))
        A = right[columns] + noise * rng.standard_normal((len(columns), right.shape[1])) / right.shape[1] ** 0.5
        scaling, weight = float(rng.uniform(0.1, 4)), float(rng.uniform(-0.5, 2))
        clients.append((LoraFactors(torch.tensor(A).to(dtype), torch.tensor(B).to(dtype), scaling), weight))
    return clients


def check_certificate(shape, clients, k, accuracy, **options):
    total, expected = ProductSum(*shape, keep_factors=options.pop("keep_factors", True)), np.zeros(shape)
    for factors, weight in clients:
        total = add_product(total, factors, weight)
        expected += weight * factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()
    spectrum, certificate = certified_decomposition(total, k, accuracy=accuracy, **options)
    S = np.linalg.svd(expected, compute_uv=False)
    kept = len(spectrum.S)
    assert kept <= k
    best = np.linalg.norm(S[k:])
    error = np.linalg.norm(expected - spectrum.delta().numpy())
    noise = 1e-13 * total.magnitude
    assert error <= (1 + certificate.excess) * best + certificate.rounding + noise
    assert certificate.excess <= TOLERANCE[accuracy]
    assert certificate.rounding <= FLOOR[accuracy] * certificate.norm + noise
    assert error <= certificate.error * (1 + 1e-9) + noise
    assert best >= certificate.optimal * (1 - 1e-6) - noise
    whole = np.linalg.norm(S)
    assert whole <= certificate.largest_norm * (1 + 1e-6) + noise
    if whole > 1e3 * noise:
        assert 1 - (error / whole) ** 2 >= certificate.least_energy_kept - 1e-6
    np.testing.assert_allclose(spectrum.U.T @ spectrum.U, np.eye(kept), atol=1e-8)
    np.testing.assert_allclose(spectrum.Vh @ spectrum.Vh.T, np.eye(kept), atol=1e-8)
    if certificate.method == "subspace":
        assert certificate.failure_probability == subspace.FAILURE_PROBABILITY
    else:
        assert certificate.failure_probability == 0
        assert certificate.tail == pytest.approx(error, rel=1e-3, abs=noise + certificate.rounding)
        assert certificate.norm == pytest.approx(np.linalg.norm(S), rel=1e-6, abs=noise)
    return certificate


@pytest.mark.usefixtures("small_sides_are_large")
@settings(max_examples=2000, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    num_clients=st.integers(1, 12),
    k=st.integers(1, 24),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    accuracy=st.sampled_from(["exact", "fast"]),
    keep_factors=st.booleans(),
)
# The directions that are left out as rounding took the floor 4 in 1,000 too far.
@example((240, 72), "low rank", 9, 6, 162166, torch.float64, "fast", False)
def test_a_certificate_holds_and_is_as_tight_as_asked(shape, kind, num_clients, k, seed, dtype, accuracy, keep_factors):
    rng = np.random.default_rng(seed)
    left, right = matrix_of(spectrum_values(kind, min(shape), k, rng), shape, rng)
    clients = split_into_clients(left, right, num_clients, rng, dtype)
    check_certificate(shape, clients, k, accuracy, keep_factors=keep_factors)


def test_every_method_is_reached(small_sides_are_large):
    rng = np.random.default_rng(0)
    shape, k = (300, 260), 12
    cases = {
        "qr": (np.geomspace(1, 1e-3, 20), 1),
        "gram": (np.geomspace(1, 1e-3, 60), 2),
        "subspace": (np.where(np.arange(260) < k, 1.0, 1e-2), 3),
        "dense_gram": (np.ones(260), 3),
        "dense_svd": (np.geomspace(1, 1e-12, 260), 3),
    }
    for method, (S, copies) in cases.items():
        left, right = matrix_of(S, shape, rng)
        factors = LoraFactors(torch.tensor(right), torch.tensor(left), 0.5)
        wanted = {"dense_svd": 200, "gram": 40}.get(method, k)
        assert check_certificate(shape, [(factors, 1.0)] * copies, wanted, "exact").method == method


@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_directions_to_begin_from_change_nothing_but_the_way(small_sides_are_large, accuracy):
    rng = np.random.default_rng(1)
    shape, k = (300, 260), 12
    left, right = matrix_of(np.where(np.arange(260) < k, np.geomspace(1, 0.1, 260), 1e-3), shape, rng)
    clients = split_into_clients(left, right, 4, rng, torch.float32)
    some = torch.tensor(right[:k])
    useless = (
        torch.tensor(right[-k:]),
        torch.zeros(k, 260),
        torch.full((k, 260), torch.nan),
        some * 1e300,
        some * 1e-300,
    )
    for start in (some, some[:3], *useless):
        check_certificate(shape, clients, k, accuracy, start=start)


@pytest.mark.parametrize("seed", range(3))
def test_directions_to_begin_from_may_come_from_the_same_random_numbers(small_sides_are_large, seed):
    """Last round's directions were found with random blocks too: they must not pass for what was found by chance."""
    rng = np.random.default_rng(seed)
    shape, k = (300, 260), 40
    left, right = matrix_of(np.where(np.arange(260) < k, 1.0, 0.5), shape, rng)
    factors = LoraFactors(torch.tensor(right), torch.tensor(left), 1.0)
    drawn = torch.randn(260, 25, generator=torch.Generator().manual_seed(0))
    start = torch.cat([drawn.T, torch.randn(15, 260, generator=torch.Generator().manual_seed(seed))])
    assert check_certificate(shape, [(factors, 1.0)], k, "exact", start=start).method == "subspace"


@pytest.mark.parametrize("small", [1e-4, 1e-6, 1e-8, 3e-9, 1e-10])
@pytest.mark.parametrize("k", [10, 20])
def test_small_values_next_to_large_ones_keep_their_digits(small_sides_are_large, small, k):
    rng = np.random.default_rng(6)
    shape, index = (300, 260), np.arange(260)
    left, right = matrix_of(np.where(index < 3, 1.0, np.where(index < 20, small, small / 3)), shape, rng)
    factors = LoraFactors(torch.tensor(right), torch.tensor(left), 1.0)
    total = add_product(ProductSum(*shape, keep_factors=True), factors, 1.0)
    spectrum, certificate = certified_decomposition(total, k)
    best = np.linalg.norm(np.linalg.svd(left @ right, compute_uv=False)[k:])
    error = np.linalg.norm(left @ right - spectrum.delta().numpy())
    assert certificate.method == "subspace"
    assert error <= (1 + certificate.excess) * best + certificate.rounding + 1e-14
    assert certificate.tail == pytest.approx(error, rel=0.2)
    np.testing.assert_allclose(spectrum.U.T @ spectrum.U, np.eye(k), atol=1e-9)
    np.testing.assert_allclose(spectrum.Vh @ spectrum.Vh.T, np.eye(k), atol=1e-9)


@pytest.mark.parametrize("draw", [331, 845, 881])
def test_what_float32_cannot_tell_is_not_certified_from_it(small_sides_are_large, draw):
    """A gap that a sum multiplied out in float32 blurs, and that one more product in float64 does not bring back."""
    rng = np.random.default_rng(draw)
    shape, k, index = (300, 260), 48, np.arange(260)
    left, right = matrix_of(np.where(index < 20, 1.0, np.where(index < k + 1, 2e-5, 1e-5)), shape, rng)
    check_certificate(shape, [(LoraFactors(torch.tensor(right), torch.tensor(left), 1.0), 1.0)], k, "exact")


@pytest.mark.parametrize(
    ("left_size", "right_size", "weight"),
    [
        (1e25, 1e25, 1.0),
        (1e25, 1e25, 1e-50),
        (1e-30, 1e-30, 1e60),
        (1e40, 1e-40, 1.0),
        (1e-90, 1e-90, 1.0),
        (1.0, 1e99, 1.0),
    ],
)
@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_sizes_that_float32_does_not_hold_change_nothing_but_the_size(
    small_sides_are_large, left_size, right_size, weight, accuracy
):
    rng = np.random.default_rng(7)
    left, right = matrix_of(np.where(np.arange(260) < 10, 1.0, 1e-2), (300, 260), rng)
    factors = LoraFactors(torch.tensor(right * right_size), torch.tensor(left * left_size), 1.0)
    total = add_product(ProductSum(300, 260, keep_factors=True), factors, weight)
    unit = left_size * right_size * weight
    spectrum, certificate = certified_decomposition(total, 10, accuracy=accuracy)
    assert certificate.method == "subspace"
    np.testing.assert_allclose(spectrum.S / unit, 1.0, rtol=1e-6)
    assert certificate.norm / unit == pytest.approx(np.linalg.norm(left), rel=0.01)
    error = np.linalg.norm(left @ right - (spectrum.U * (spectrum.S / unit) @ spectrum.Vh).numpy())
    assert error <= (1 + certificate.excess) * np.linalg.norm(left[:, 10:])


@pytest.mark.parametrize("seed", range(5))
def test_many_equal_values_are_no_obstacle(small_sides_are_large, seed):
    rng = np.random.default_rng(seed)
    left, right = matrix_of(np.ones(142), (142, 213), rng)
    factors = LoraFactors(torch.tensor(right), torch.tensor(left), 1.0)
    check_certificate((142, 213), [(factors, 1.0)], 8, "fast", keep_factors=False)


def test_a_direction_that_random_vectors_can_hardly_see_is_not_certified_away(small_sides_are_large):
    """One large direction on top of a flat spectrum, in the sum of many clients, for many draws of the rotation."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shape = (160, 140)
        left, right = matrix_of(np.where(np.arange(140) < 1, 1.02, 1.0), shape, rng)
        factors = LoraFactors(torch.tensor(right), torch.tensor(left), 1.0)
        check_certificate(shape, [(factors, 1.0)], 1, "fast")


def test_results_are_the_same_bits_every_time():
    rng = np.random.default_rng(2)
    shape = (900, 800)
    left, right = matrix_of(np.geomspace(1, 1e-6, 800), shape, rng)
    total = ProductSum(*shape, keep_factors=True)
    for factors, weight in split_into_clients(left, right, 3, rng, torch.float32):
        total = add_product(total, factors, weight)
    first, _ = certified_decomposition(total, 20)
    second, certificate = certified_decomposition(total, 20)
    assert certificate.method == "subspace"
    for name in ("U", "S", "Vh"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_the_certificate_of_a_multiple_is_the_multiple():
    rng = np.random.default_rng(3)
    left, right = matrix_of(np.geomspace(1, 1e-3, 30), (80, 70), rng)
    total = add_product(ProductSum(80, 70), LoraFactors(torch.tensor(right), torch.tensor(left), 1.0), 1.0)
    spectrum, one = certified_decomposition(total, 5)
    halved, half = certified_decomposition(total, 5, divisor=2.0)
    assert half.norm == pytest.approx(one.norm / 2)
    assert half.tail == pytest.approx(one.tail / 2) == pytest.approx(halved.tail)
    assert half.energy_kept == pytest.approx(one.energy_kept)
    torch.testing.assert_close(halved.S, spectrum.S / 2)


@pytest.mark.parametrize("most_directions", [6, 15, 40])
def test_a_sum_that_keeps_few_directions_says_how_much_it_lost(most_directions):
    rng = np.random.default_rng(4)
    shape, k = (90, 80), 5
    left, right = matrix_of(np.exp(-np.arange(80) / 6), shape, rng)
    clients = split_into_clients(left, right, 9, rng, torch.float32)
    total, expected = ProductSum(*shape, most_directions=most_directions), np.zeros(shape)
    for factors, weight in clients:
        total = add_product(total, factors, weight)
        expected += weight * factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()
        assert total.total_rank <= 2 * most_directions
        assert total.dense is None
    spectrum, certificate = certified_decomposition(total, k)
    S = np.linalg.svd(expected, compute_uv=False)
    error = np.linalg.norm(expected - spectrum.delta().numpy())
    assert error <= (1 + certificate.excess) * np.linalg.norm(S[k:]) + certificate.rounding
    assert total.discarded >= 0.9 * np.linalg.norm(S[2 * most_directions :])
    if most_directions == 40:
        assert error == pytest.approx(np.linalg.norm(S[k:]), rel=1e-6)


def devices() -> list[object]:
    return ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("accuracy", ["exact", "fast"])
def test_the_modules_of_a_model_are_decomposed_as_each_would_be_alone(device, accuracy):
    """Equal ones side by side, among them a steep one, one of nothing, and others in shape, rank and method."""
    rng = np.random.default_rng(7)
    steep, smooth = np.geomspace(1, 1e-30, 120), np.geomspace(1, 1e-2, 120)
    modules = [
        ((200, 180), smooth, 30),
        ((200, 180), steep, 30),
        ((200, 180), smooth, 30),
        ((200, 180), np.zeros(120), 30),
        ((200, 180), smooth, 31),
        ((200, 180), smooth[:20], 30),
        ((200, 180), smooth[:20], 30),
        ((180, 200), smooth[:20], None),
        ((900, 800), np.geomspace(1, 1e-4, 700), 10),
        ((50, 40), np.ones(40), 35),
    ]
    totals, sums = [], []
    for shape, S, _ in modules:
        left, right = matrix_of(S, shape, rng)
        factors = LoraFactors(torch.tensor(right), torch.tensor(left), 1.5)
        totals.append(add_product(ProductSum(*shape, keep_factors=True), factors, 2.0))
        sums.append(3.0 * left @ right)
    ks = [k for _, _, k in modules]
    answers = certified_decompositions(totals, ks, 2.0, accuracy, device=device)
    methods = [certificate.method for _, certificate in answers]
    assert methods[:7] == ["gram", "qr", "gram", "qr", "gram", "qr", "qr"]
    for (spectrum, certificate), expected, k in zip(answers, sums, ks, strict=True):
        assert spectrum.U.device.type == device
        S = np.linalg.svd(expected, compute_uv=False)
        best = np.linalg.norm(S[k:]) if k else 0.0
        error = np.linalg.norm(expected - 2.0 * spectrum.delta().cpu().numpy())
        bound = (1 + certificate.excess) * best + 2.0 * certificate.rounding
        assert error <= bound + 1e-13 * np.linalg.norm(S)
        np.testing.assert_allclose(2.0 * spectrum.S.cpu(), S[: len(spectrum.S)], atol=1e-3 * max(S[0], 1e-9))


def test_sums_that_are_computed_together_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    left, right = matrix_of(np.ones(10), (60, 50), rng)
    factors = LoraFactors(torch.tensor(right), torch.tensor(left), 1.0)
    totals = [add_product(ProductSum(60, 50), factors, float(weight)) for weight in range(1, 8)]
    monkeypatch.setattr(decomposition, "BATCH_BYTES", 3 * 8 * 110 * 10)
    operators = [Operator(60, 50, total.terms, None, torch.device("cpu"), total.magnitude) for total in totals]
    assert decomposition._batches(operators, [5] * 7) == [[0, 1, 2], [3, 4, 5], [6]]
    for weight, (spectrum, _) in enumerate(certified_decompositions(totals, [None] * 7), start=1):
        np.testing.assert_allclose(spectrum.S, np.full(10, float(weight)), rtol=1e-12)


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_needs_no_help_from_the_processor(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(9)
    left, right = matrix_of(np.geomspace(1, 1e-4, 900), (1200, 1000), rng)
    total, expected = ProductSum(1200, 1000, keep_factors=True), np.zeros((1200, 1000))
    for factors, weight in split_into_clients(left, right, 4, rng, dtype):
        expected += weight * factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()
        on_gpu = LoraFactors(factors.A.cuda(), factors.B.cuda(), factors.scaling)
        total = add_product(total, on_gpu, weight)
    spectrum, certificate = certified_decomposition(total, 20, accuracy="fast")
    # Which way is cheapest differs between cards; all but the dense SVD stay on them.
    assert spectrum.U.device.type == "cuda" and certificate.method in ("subspace", "gram", "dense_gram")
    best = np.linalg.norm(np.linalg.svd(expected, compute_uv=False)[20:])
    error = np.linalg.norm(expected - spectrum.delta().cpu().numpy())
    assert error <= (1 + certificate.excess) * best + certificate.rounding + 1e-13 * total.magnitude


def test_probes_depend_on_every_part_of_a_sum(small_sides_are_large):
    """Whoever could tell them in advance could hide from them: neither part, nor where to begin, is enough."""
    rng = np.random.default_rng(10)
    shape = (60, 50)

    def operator(dense: float, weight: float) -> Operator:
        left, right = rng.standard_normal((60, 4)), rng.standard_normal((4, 50))
        factors = LoraFactors(torch.tensor(right), torch.tensor(left), 1.0)
        total = add_product(ProductSum(*shape, keep_factors=True), factors, weight)
        terms = total.terms if weight else ()
        return Operator(*shape, terms, dense * torch.tensor(left @ right), torch.device("cpu"), 1.0)

    start = torch.tensor(rng.standard_normal((50, 5)))
    sums = [operator(1.0, 0.0), operator(1.0, 0.0), operator(1.0, 1.0), operator(2.0, 0.0)]
    probes = [subspace._first_block(one, one, 5, given)[1] for one in sums for given in (None, start)]
    for first, second in itertools.combinations(probes, 2):
        assert float((first - second).abs().min()) > 0
    again = subspace._first_block(sums[0], sums[0], 5, None)[1]
    assert torch.equal(again, probes[0])


def test_rounding_of_equal_terms_which_all_err_alike_is_allowed_for(small_sides_are_large):
    rng = np.random.default_rng(11)
    copies, shape = 1500, (200, 200)
    left, right = matrix_of(np.array([1.0, 0.5]), shape, rng)
    one = LoraFactors(torch.tensor(right).float(), torch.tensor(left).float(), 1.0)
    total = ProductSum(*shape, keep_factors=True)
    for _ in range(copies):
        total = add_product(total, one, 1.0 / copies)
    expected = one.B.double().numpy() @ one.A.double().numpy()
    spectrum, certificate = certified_decomposition(total, 4, accuracy="fast")
    error = np.linalg.norm(expected - spectrum.delta().numpy())
    assert error <= certificate.rounding + 1e-13
    assert certificate.rounding <= FLOOR["fast"] * certificate.norm


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_have_full_precision_whatever_is_set_for_training(monkeypatch, precision):
    seen: list[str] = []
    apply = Operator.apply
    monkeypatch.setattr(
        Operator, "apply", lambda *args: (seen.append(torch.get_float32_matmul_precision()), apply(*args))[1]
    )
    rng = np.random.default_rng(12)
    left, right = matrix_of(np.geomspace(1, 1e-4, 800), (900, 800), rng)
    total = add_product(ProductSum(900, 800), LoraFactors(torch.tensor(right), torch.tensor(left), 1.0), 1.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        certified_decomposition(total, 10, accuracy="fast")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen and set(seen) == {"highest"}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def large_modules(monkeypatch):
    """Three sums that count as large, of falling size, so that they do not end in the order of their places."""
    monkeypatch.setattr(decomposition, "SERIAL_SIDE", 40)
    monkeypatch.setattr(decomposition, "SERIAL_WORK", 0)
    rng = np.random.default_rng(8)
    totals, sums = [], []
    for side in (300, 160, 80):
        left, right = matrix_of(np.geomspace(1, 1e-4, 70), (side, 80), rng)
        total, expected = ProductSum(side, 80, keep_factors=True), np.zeros((side, 80))
        for factors, weight in split_into_clients(left, right, 3, rng, torch.float32):
            total = add_product(total, factors, weight)
            expected += weight * factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()
        totals.append(total)
        sums.append(expected)
    return totals, sums


def test_large_modules_are_decomposed_side_by_side_on_one_thread_each(two_threads, large_modules, monkeypatch):
    seen = []

    def look(*arguments):
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        return by_cheapest(*arguments)

    by_cheapest = decomposition._by_cheapest
    monkeypatch.setattr(decomposition, "_by_cheapest", look)
    totals, sums = large_modules
    answers = certified_decompositions(totals, [10, 30, None])
    assert torch.get_num_threads() == 2
    assert {num_threads for _, num_threads in seen} == {1}
    assert threading.current_thread().name not in {name for name, _ in seen}
    for (spectrum, certificate), expected, k in zip(answers, sums, (10, 30, 80), strict=True):
        S = np.linalg.svd(expected, compute_uv=False)
        np.testing.assert_allclose(spectrum.S[:10], S[:10], rtol=1e-5)
        error = np.linalg.norm(expected - spectrum.delta().numpy())
        assert error <= (1 + certificate.excess) * np.linalg.norm(S[k:]) + certificate.rounding
        assert certificate.tail == pytest.approx(np.linalg.norm(S[k:]), rel=1e-4, abs=1e-5)
    again = certified_decompositions(totals, [10, 30, None])
    for (one, _), (other, _) in zip(answers, again, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("U", "S", "Vh"))
    # Too few of them, or too little memory, and each has all threads.
    seen.clear()
    certified_decompositions(totals[:1], [10])
    monkeypatch.setattr(decomposition, "MEMORY_SHARE", 0.0)
    certified_decompositions(totals, [10] * 3)
    assert seen == [(threading.current_thread().name, 2)] * 4


def test_a_module_that_cannot_be_decomposed_beside_others_is_an_error_like_any_other(
    two_threads, large_modules, monkeypatch
):
    def fail(operator, *arguments):
        if operator.out_features == 160:
            raise DecompositionError("no luck")
        return by_cheapest(operator, *arguments)

    by_cheapest = decomposition._by_cheapest
    monkeypatch.setattr(decomposition, "_by_cheapest", fail)
    with pytest.raises(ProductError, match="no luck"):
        certified_decompositions(large_modules[0], [10] * 3)
    assert torch.get_num_threads() == 2
