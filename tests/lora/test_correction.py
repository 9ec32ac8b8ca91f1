"""Expected values come from scipy: the dense normal equations, and a minimiser that knows nothing of them."""

import numpy as np
import pytest
import torch
from scipy import linalg, optimize

from flexlora.lora.correction import b_correction
from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import ProductSum, add_product

SHAPE = (23, 31)


def drawn(rank: int, seed: int, scaling: float) -> LoraFactors:
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((rank, SHAPE[1])), rng.standard_normal((SHAPE[0], rank))
    return LoraFactors(torch.tensor(A), torch.tensor(B), scaling)


def summed(num_clients: int) -> tuple[ProductSum, np.ndarray, float]:
    """Return a weighted sum of products, the same dense, and the sum of the weights."""
    total, dense, weights = ProductSum(*SHAPE), np.zeros(SHAPE), 0.0
    for seed in range(num_clients):
        factors, weight = drawn(1 + seed % 4, seed, 0.5 + seed), 1.0 + seed % 3
        total = add_product(total, factors, weight)
        dense += weight * factors.scaling * factors.B.numpy() @ factors.A.numpy()
        weights += weight
    return total, dense, weights


@pytest.mark.parametrize("num_clients", [3, 40])  # kept as stacks, multiplied out
@pytest.mark.parametrize("ridge", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("scaling", [1.0, 2.7])
def test_the_correction_is_that_of_the_dense_normal_equations(num_clients: int, ridge: float, scaling: float) -> None:
    total, dense, weights = summed(num_clients)
    assert (total.dense is None) == (num_clients == 3)
    mean = drawn(4, 99, scaling)
    A, B = mean.A.numpy(), mean.B.numpy()
    residual = dense / weights / scaling - B @ A
    expected = linalg.solve(A @ A.T + ridge * np.eye(4), A @ residual.T, assume_a="pos").T
    found = b_correction(total, weights, mean, ridge).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11 * np.abs(expected).max())


def test_no_other_change_of_b_has_a_lower_penalised_distance() -> None:
    total, dense, weights = summed(3)
    mean = drawn(2, 5, 1.0)

    def distance(dB: np.ndarray) -> float:
        error = dense / weights - (mean.B.numpy() + dB.reshape(SHAPE[0], 2)) @ mean.A.numpy()
        return float(np.sum(error**2) + 0.3 * np.sum(dB**2))

    found = optimize.minimize(distance, np.zeros(2 * SHAPE[0]), tol=1e-12).x.reshape(SHAPE[0], 2)
    np.testing.assert_allclose(b_correction(total, weights, mean, 0.3).numpy(), found, atol=1e-4)


def test_without_a_ridge_dependent_rows_have_the_smallest_correction() -> None:
    total, dense, weights = summed(3)
    mean = drawn(3, 5, 1.0)
    mean.A[2] = mean.A[1]
    A, B = mean.A.numpy(), mean.B.numpy()
    expected = (dense / weights - B @ A) @ np.linalg.pinv(A)
    np.testing.assert_allclose(b_correction(total, weights, mean, 0.0).numpy(), expected, rtol=1e-8, atol=1e-10)


def test_rows_that_are_all_zero_get_no_correction() -> None:
    total, _, weights = summed(3)
    mean = drawn(3, 5, 1.0)
    mean.A.zero_()
    assert not b_correction(total, weights, mean, 0.0).any()
