"""Expected values come from numpy: a dense float64 sum and numpy.linalg.svd."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.lora.factors import FactorsError, LoraFactors
from flexlora.lora.product import ProductError, ProductSum, Spectrum, add_product, add_spectrum, decompose, spectrum_of

FEW, MANY = 3, 40  # clients: total rank far below, and far above, min(out_features, in_features)


def random_updates(shape: tuple[int, int], num_clients: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    rng = np.random.default_rng(seed)
    updates: list[tuple[LoraFactors, float]] = []
    for _ in range(num_clients):
        rank = int(rng.integers(1, 5))
        A = torch.tensor(rng.standard_normal((rank, shape[1]))).to(dtype)
        B = torch.tensor(rng.standard_normal((shape[0], rank))).to(dtype)
        updates.append((LoraFactors(A, B, float(rng.uniform(0.1, 8))), float(rng.uniform(-1, 3))))
    return updates


def add_all(shape: tuple[int, int], updates) -> ProductSum:
    total = ProductSum(*shape)
    for factors, weight in updates:
        total = add_product(total, factors, weight)
    return total


def numpy_sum(shape: tuple[int, int], updates) -> np.ndarray:
    total = np.zeros(shape)
    for factors, weight in updates:
        total += weight * factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()
    return total


def numpy_truncation(W: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def relative_error(found: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


def of_singular_values(S: np.ndarray, shape: tuple[int, int], seed: int = 0):
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((shape[0], len(S))))[0]
    V = np.linalg.qr(rng.standard_normal((shape[1], len(S))))[0]
    return U, V.T


@pytest.mark.parametrize("num_clients", [1, FEW, MANY])
@pytest.mark.parametrize("shape", [(24, 24), (40, 22), (22, 40), (1, 9), (9, 1)])
def test_every_truncation_equals_the_dense_float64_oracle(shape, num_clients):
    updates = random_updates(shape, num_clients)
    expected = numpy_sum(shape, updates)
    spectrum = decompose(add_all(shape, updates))
    S = np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(spectrum.S.numpy(), S[: len(spectrum.S)], rtol=1e-10)
    for rank in range(1, len(spectrum.S) + 1):
        change = spectrum.factors(rank, scaling=0.7).delta()
        assert relative_error(change, numpy_truncation(expected, rank)) < 1e-10
        assert np.linalg.norm(change.numpy() - expected) == pytest.approx(np.linalg.norm(S[rank:]), abs=1e-11 * S[0])


def test_factors_are_kept_until_the_change_itself_is_smaller_and_the_result_does_not_depend_on_it():
    shape = (30, 26)
    updates = random_updates(shape, FEW)
    few = add_all(shape, updates)
    assert few.dense is None
    assert few.total_rank == sum(factors.rank for factors, _ in updates)
    assert few.terms[0].left.data_ptr() == updates[0][0].B.data_ptr()
    rest = random_updates(shape, MANY, seed=1)
    many = add_all(shape, updates + rest)
    assert many.dense is not None
    kept = ProductSum(*shape, keep_factors=True)
    for factors, weight in updates + rest:
        kept = add_product(kept, factors, weight)
    assert kept.dense is None
    assert relative_error(decompose(kept, 26).delta(), decompose(many, 26).delta().numpy()) < 1e-12
    for factors, weight in rest:
        many = add_product(many, factors, -weight)
    assert relative_error(decompose(many, 26).delta(), decompose(few).delta().numpy()) < 1e-12


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    num_clients=st.integers(1, 12),
    max_rank=st.integers(1, 25),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_signed_sum_is_decomposed_as_the_oracle_does(shape, num_clients, max_rank, seed, dtype):
    updates = random_updates(shape, num_clients, seed, dtype)
    expected = numpy_sum(shape, updates)
    scale = sum(abs(weight) * factors.norm() for factors, weight in updates)
    spectrum = decompose(add_all(shape, updates), max_rank, divisor=2.0)
    k = len(spectrum.S)
    assert k <= min(max_rank, *shape)
    S = np.linalg.svd(expected, compute_uv=False) / 2
    np.testing.assert_allclose(spectrum.S.numpy(), S[:k], atol=1e-13 * scale)
    assert spectrum.tail == pytest.approx(np.linalg.norm(S[k:]), abs=1e-12 * scale)
    distance = np.linalg.norm(spectrum.delta().numpy() - expected / 2)
    assert distance == pytest.approx(np.linalg.norm(S[k:]), abs=1e-12 * scale)
    np.testing.assert_allclose(spectrum.U.T @ spectrum.U, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(spectrum.Vh @ spectrum.Vh.T, np.eye(k), atol=1e-12)
    assert (spectrum.S.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(200, 120), (18, 16)])
def test_graded_singular_values_keep_their_digits(shape):
    S = np.geomspace(1, 1e-7, 12)
    U, Vh = of_singular_values(S, shape)
    A, B = torch.tensor(Vh), torch.tensor(U * S)
    other = random_updates(shape, 6, dtype=torch.float64)
    parts = [(LoraFactors(A[:5], B[:, :5], 1.0), 1.0), (LoraFactors(A[5:], B[:, 5:], 0.5), 2.0)]
    total = add_all(shape, [*other, *parts])
    for factors, weight in other:
        total = add_product(total, factors, -weight)
    np.testing.assert_allclose(decompose(total).S[:12].numpy(), S, rtol=1e-6)


def test_a_sum_that_cancels_and_a_sum_of_nothing_have_no_directions():
    shape = (20, 30)
    updates = random_updates(shape, FEW)
    cancelled = add_all(shape, updates + [(factors, -weight) for factors, weight in updates])
    for total in (cancelled, ProductSum(*shape)):
        spectrum = decompose(total)
        assert spectrum.S.shape == (0,)
        assert spectrum.delta().shape == shape
        assert spectrum.tail < 1e-12


@pytest.mark.parametrize("num_copies", [2, 60])
def test_duplicated_updates_do_not_raise_the_number_of_directions(num_copies):
    (factors, _), *_ = random_updates((25, 31), 1, seed=4)
    total = add_all((25, 31), [(factors, 1.0)] * num_copies)
    spectrum = decompose(total, divisor=float(num_copies))
    assert len(spectrum.S) == factors.rank
    assert relative_error(spectrum.delta(), factors.delta().numpy()) < 1e-13


def test_adding_leaves_every_earlier_sum_as_it_was():
    shape = (12, 10)
    updates = random_updates(shape, MANY)
    sums = [ProductSum(*shape)]
    for factors, weight in updates:
        sums.append(add_product(sums[-1], factors, weight))
    for index in (0, 1, 5, MANY - 1):
        np.testing.assert_allclose(
            decompose(sums[index]).delta().numpy(), numpy_sum(shape, updates[:index]), atol=1e-11
        )


def test_directions_of_a_spectrum_are_added_with_values_of_any_sign():
    shape = (9, 14)
    updates = random_updates(shape, FEW)
    spectrum = decompose(add_all(shape, updates))
    halved = add_spectrum(add_all(shape, updates), spectrum, -0.5 * spectrum.S)
    assert relative_error(decompose(halved).delta(), 0.5 * numpy_sum(shape, updates)) < 1e-13


def test_the_result_does_not_depend_on_the_gauge_of_the_factors():
    shape = (20, 17)
    updates = random_updates(shape, FEW, dtype=torch.float64)
    rng = np.random.default_rng(9)
    turned: list[tuple[LoraFactors, float]] = []
    for factors, weight in updates:
        M = torch.tensor(rng.standard_normal((factors.rank, factors.rank)) + 3 * np.eye(factors.rank))
        turned.append((LoraFactors(torch.linalg.solve(M, factors.A), factors.B @ M, factors.scaling), weight))
    first, second = decompose(add_all(shape, updates)), decompose(add_all(shape, turned))
    assert relative_error(second.U, first.U.numpy()) < 1e-11
    assert relative_error(second.Vh, first.Vh.numpy()) < 1e-11


def test_signs_are_fixed_by_the_largest_entry_of_each_right_vector():
    Vh = decompose(add_all((20, 17), random_updates((20, 17), MANY))).Vh
    assert (Vh.gather(1, Vh.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    (factors, _), *_ = random_updates((5, 6), 1)
    factors.A[0, 0] = bad
    with pytest.raises(ProductError, match="must be finite"):
        decompose(add_product(ProductSum(5, 6), factors, 1.0))


SVD_SHAPES = pytest.mark.parametrize("shape", [(24, 24), (40, 22), (22, 40), (1, 9), (9, 1)])


@SVD_SHAPES
@pytest.mark.parametrize("num_clients", [0, 1, FEW, MANY])
@pytest.mark.parametrize("max_rank", [None, 1, 2])
def test_every_tensor_of_a_spectrum_is_stored_row_by_row(shape, num_clients, max_rank):
    spectrum = decompose(add_all(shape, random_updates(shape, num_clients)), max_rank)
    for tensor in (spectrum.U, spectrum.S, spectrum.Vh):
        assert tensor.stride() == torch.empty(tensor.shape).stride()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def failing_svd(monkeypatch: pytest.MonkeyPatch, num_failures: int) -> None:
    real, calls = torch.linalg.svd, iter(range(1000))

    def svd(*args, **options):
        if next(calls) < num_failures:
            raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")
        return real(*args, **options)

    monkeypatch.setattr(torch.linalg, "svd", svd)


@SVD_SHAPES
@pytest.mark.parametrize("num_clients", [1, MANY])
@pytest.mark.parametrize("size", [1e-60, 1.0, 1e60])
def test_a_decomposition_that_does_not_converge_is_tried_another_way(shape, num_clients, size, monkeypatch):
    updates = [(factors, size * weight) for factors, weight in random_updates(shape, num_clients)]
    expected = decompose(add_all(shape, updates))
    failing_svd(monkeypatch, 1)
    found = decompose(add_all(shape, updates))
    np.testing.assert_allclose(found.S.numpy(), expected.S.numpy(), rtol=1e-11)
    assert relative_error(found.delta(), expected.delta().numpy()) < 1e-12
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(len(found.S)), atol=1e-12)
    for tensor in (found.U, found.S, found.Vh):
        assert tensor.stride() == torch.empty(tensor.shape).stride()


@pytest.mark.parametrize("num_clients", [1, MANY])
def test_a_decomposition_that_never_converges_is_an_error_that_says_so(num_clients, monkeypatch):
    total = add_all((12, 10), random_updates((12, 10), num_clients))
    failing_svd(monkeypatch, 1000)
    with pytest.raises(ProductError, match=r"\(.*norm .* did not converge in two attempts"):
        decompose(total)


def test_changes_of_another_shape_are_refused():
    (factors, _), *_ = random_updates((5, 6), 1)
    with pytest.raises(ProductError, match=r"\(6, 5\); got \(5, 6\)"):
        add_product(ProductSum(6, 5), factors, 1.0)


def example_spectrum(k: int = 3, shape: tuple[int, int] = (10, 8)) -> Spectrum:
    S = np.geomspace(4, 0.5, k)
    U, Vh = of_singular_values(S, shape)
    return Spectrum(torch.tensor(U), torch.tensor(S), torch.tensor(Vh))


@pytest.mark.parametrize("scaling", [0.25, 1.0, 16.0])
def test_the_paper_split_puts_all_singular_values_into_b(scaling):
    spectrum = example_spectrum()
    factors = spectrum.factors(2, scaling)
    np.testing.assert_array_equal(factors.A.numpy(), spectrum.Vh[:2].numpy())
    np.testing.assert_allclose((scaling * factors.B).norm(dim=0).numpy(), spectrum.S[:2].numpy(), rtol=1e-13)


@pytest.mark.parametrize("scaling", [0.25, 1.0, 16.0])
def test_the_balanced_split_gives_both_factors_the_same_norms_and_the_same_product(scaling):
    spectrum = example_spectrum()
    factors = spectrum.factors(2, scaling, "balanced")
    np.testing.assert_allclose(factors.A.norm(dim=1).numpy(), factors.B.norm(dim=0).numpy(), rtol=1e-13)
    np.testing.assert_allclose(factors.delta().numpy(), spectrum.factors(2, scaling).delta().numpy(), atol=1e-14)


@pytest.mark.parametrize("split", ["b", "balanced"])
@pytest.mark.parametrize("num_spare", [None, 2, 8])
def test_directions_beyond_the_spectrum_get_orthonormal_rows_and_zero_columns(split, num_spare):
    spare = None if num_spare is None else torch.randn(num_spare, 8, generator=torch.Generator().manual_seed(0))
    spectrum = example_spectrum()
    factors = spectrum.factors(8, 2.0, split, spare)
    assert factors.rank == 8
    assert not factors.B[:, 3:].any()
    rows = torch.cat([spectrum.Vh, factors.A[3:]])
    np.testing.assert_allclose(rows @ rows.T, np.eye(8), atol=1e-13)
    np.testing.assert_allclose(factors.delta().numpy(), spectrum.delta().numpy(), atol=1e-14)


@pytest.mark.parametrize("split", ["b", "balanced"])
def test_a_zero_singular_value_counts_as_no_direction(split):
    spectrum = example_spectrum()
    with_zero = Spectrum(spectrum.U, torch.cat([spectrum.S[:2], torch.zeros(1, dtype=torch.float64)]), spectrum.Vh)
    factors = with_zero.factors(3, 2.0, split)
    assert factors.A[2].norm() == pytest.approx(1)
    assert not factors.B[:, 2].any()


def test_rows_beyond_the_number_of_features_are_of_unit_length_and_differ():
    factors = example_spectrum().factors(14, 1.0)
    assert factors.A.shape == (14, 8)
    np.testing.assert_allclose(factors.A.norm(dim=1).numpy(), np.ones(14), rtol=1e-13)
    assert torch.linalg.matrix_rank(factors.A[8:]) == 6


def test_before_anything_is_learned_the_rows_are_the_spare_ones_as_they_are():
    spare = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    nothing = decompose(ProductSum(10, 8))
    assert torch.equal(nothing.factors(4, 2.0, spare=spare).A.float(), spare[:4])
    longer = nothing.factors(7, 2.0, spare=spare).A
    assert torch.equal(longer[:5].float(), spare)
    np.testing.assert_allclose(longer[5:] @ longer[:5].T, np.zeros((2, 5)), atol=1e-13)


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("split", ["b", "balanced"])
def test_a_smaller_rank_is_a_slice_of_a_larger_one(k, split):
    spectrum = decompose(ProductSum(10, 8)) if k == 0 else example_spectrum(k)
    # The first usable spare row lies in the span of what is taken, so it has to be skipped at every rank alike.
    in_span = spectrum.Vh.sum(0, keepdim=True) if k else torch.ones(1, 8, dtype=torch.float64)
    spare = torch.cat([torch.rand(k, 8, dtype=torch.float64), in_span, torch.eye(8, dtype=torch.float64)[:2]])
    largest = spectrum.factors(12, 1.5, split, spare)
    for rank in range(1, 12):
        smaller = spectrum.factors(rank, 1.5, split, spare)
        np.testing.assert_allclose(smaller.A.numpy(), largest.A[:rank].numpy(), atol=1e-13)
        np.testing.assert_allclose(smaller.B.numpy(), largest.B[:, :rank].numpy(), atol=1e-13)


def test_truncating_moves_energy_into_the_tail_and_below_is_the_rest():
    spectrum = example_spectrum()
    smaller = spectrum.truncate(1).truncate(0)
    assert smaller.tail == pytest.approx(float(spectrum.S.norm()))
    np.testing.assert_allclose(
        (spectrum.truncate(1).delta() + spectrum.below(1).delta()).numpy(), spectrum.delta().numpy(), atol=1e-14
    )


@pytest.mark.parametrize(("rank", "scaling"), [(0, 1.0), (2, 0.0), (2, -1.0)])
def test_ranks_below_one_and_scalings_that_are_not_positive_are_refused(rank, scaling):
    with pytest.raises(FactorsError, match="at least 1 and scaling positive"):
        example_spectrum().factors(rank, scaling)


def test_the_spectrum_of_one_change_is_that_of_its_delta():
    (factors, _), *_ = random_updates((15, 12), 1, seed=3)
    expected = np.linalg.svd(factors.delta().numpy(), compute_uv=False)[: factors.rank]
    np.testing.assert_allclose(spectrum_of(factors).S.numpy(), expected, rtol=1e-12)


def test_the_spectrum_of_one_change_may_be_cut_and_then_stores_no_more_than_it_keeps():
    (factors, _), *_ = random_updates((15, 12), 1, seed=3)
    whole, cut = spectrum_of(factors), spectrum_of(factors, max_rank=1)
    assert torch.equal(cut.S, whole.S[:1])
    assert cut.tail == pytest.approx(float(whole.S[1:].norm()))
    assert cut.U.untyped_storage().nbytes() == cut.U.nbytes


MODULES_IN_TURN = """
from pathlib import Path
import torch
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import ProductSum, add_product, certified_decompositions

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
left, right = torch.randn(1600, 20, generator=generator), torch.randn(20, 1600, generator=generator)
total = ProductSum(1600, 1600, keep_factors=True)
for _ in range(12):
    A = torch.randn(200, 20, generator=generator) @ right + torch.randn(200, 1600, generator=generator) / 40
    total = add_product(total, LoraFactors(A, left @ torch.randn(20, 200, generator=generator), 1.0), 1.0)
for number in (2, 8):
    certified_decompositions([total] * number, [20] * number, accuracy="fast")
    # Of this program alone; what getrusage says begins at the peak of the process that started it.
    print(next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_modules():
    # The factors are the same ones each time: copies of them, 31 MB a module, are all that could add up.
    run = subprocess.run([sys.executable, "-c", MODULES_IN_TURN], capture_output=True, text=True, check=True)
    of_two, of_eight = map(int, run.stdout.split())
    assert of_eight - of_two < 62
