"""Expected products and errors are dense ones in float64, by numpy."""

import numpy as np
import pytest
import torch

from flexlora.lora.factors import LoraFactors
from flexlora.lora.sketch import (
    NUM_PROBES,
    largest_in_columns,
    largest_in_rows,
    product_of,
    projection_part,
    range_of,
    range_part,
    sketch_columns,
)

OUT, IN = 30, 22
WEIGHTS = (3.0, 1.0, 2.5)


def clients_of(seed=0, ranks=(1, 3, 4), decay=1.0):
    rng = np.random.default_rng(seed)
    clients = []
    for rank, scaling in zip(ranks, (16.0, 0.5, 2.0), strict=True):
        sizes = decay ** np.arange(rank)
        A = torch.from_numpy(rng.standard_normal((rank, IN)) * sizes[:, None]).float()
        clients.append(LoraFactors(A, torch.from_numpy(rng.standard_normal((OUT, rank))).float(), scaling))
    return clients


def dense(clients):
    return sum(
        weight * one.scaling * one.B.double().numpy() @ one.A.double().numpy()
        for weight, one in zip(WEIGHTS, clients, strict=True)
    )


def sketched(clients, Omega):
    Y = sum(weight * range_part(one, Omega) for weight, one in zip(WEIGHTS, clients, strict=True))
    Q, error = range_of(Y, IN)
    Z = sum(weight * projection_part(one, Q) for weight, one in zip(WEIGHTS, clients, strict=True))
    return product_of(Q, Z).delta().numpy(), error


@pytest.mark.parametrize("num_columns", [8 + NUM_PROBES, 20])
def test_a_sketch_that_covers_the_rank_is_exact_and_says_so(num_columns):
    clients = clients_of()
    Omega = sketch_columns(clients[2].A, num_columns, np.random.default_rng(1))
    found, error = sketched(clients, Omega)
    expected = dense(clients)
    assert np.linalg.norm(found - expected) <= error < 1e-6 * np.linalg.norm(expected)


def test_of_a_smaller_sketch_the_error_is_estimated_without_bias_and_from_above():
    clients = clients_of(ranks=(6, 9, 7), decay=0.8)
    expected = dense(clients)
    true, estimated, before = [], [], []
    for seed in range(200):
        Omega = sketch_columns(clients[1].A, 12, np.random.default_rng(seed))
        found, error = sketched(clients, Omega)
        true.append(np.linalg.norm(found - expected))
        estimated.append(error**2)
        first = (expected @ Omega.numpy())[:, : 12 - NUM_PROBES]
        U = np.linalg.svd(first, full_matrices=False)[0]
        before.append(np.linalg.norm(expected - U @ (U.T @ expected)) ** 2)
    assert np.mean(estimated) == pytest.approx(np.mean(before), rel=0.1)
    assert np.mean(np.array(true) ** 2) < np.mean(estimated)


def test_a_sketch_begins_with_the_rows_it_is_given_and_is_orthonormal():
    rows = clients_of()[2].A
    Omega = sketch_columns(rows, 10, np.random.default_rng(0))
    assert torch.allclose(Omega.T @ Omega, torch.eye(10).double(), atol=1e-12)
    left = rows.double() - rows.double() @ Omega[:, :4] @ Omega[:, :4].T
    assert left.norm() < 1e-6 * rows.norm()
    assert torch.equal(Omega, sketch_columns(rows, 10, np.random.default_rng(0)))


def test_rows_that_are_zero_or_repeat_leave_their_places_to_chance():
    rows = torch.zeros(4, IN)
    rows[0, 0] = rows[1, 0] = 1.0
    Omega = sketch_columns(rows, 9, np.random.default_rng(0))
    assert Omega.shape == (IN, 9) and torch.allclose(Omega.T @ Omega, torch.eye(9).double(), atol=1e-12)
    assert sketch_columns(torch.zeros(2, IN), 9, np.random.default_rng(0)).isfinite().all()
    assert sketch_columns(rows[:0], 3, np.random.default_rng(0)).shape == (IN, 3)


def test_a_sum_of_nothing_is_nothing():
    clients = [LoraFactors(torch.ones(2, IN), torch.zeros(OUT, 2), 1.0)] * 3
    found, error = sketched(clients, sketch_columns(clients[0].A, 8, np.random.default_rng(0)))
    assert not found.any() and error == 0


@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_however_training_moves_the_entries(seed):
    rng, change = np.random.default_rng(seed), 0.3
    start = clients_of(seed)[seed % 3]
    worst = LoraFactors(
        start.A + change * torch.from_numpy(np.sign(rng.standard_normal(start.A.shape))).float(),
        start.B + change * torch.from_numpy(np.sign(rng.standard_normal(start.B.shape))).float(),
        start.scaling,
    )
    P = worst.delta().numpy()
    assert np.linalg.norm(P, axis=1).max() <= largest_in_rows(start, change)
    assert np.linalg.norm(P, axis=0).max() <= largest_in_columns(start, change)
    exact = LoraFactors(torch.eye(1, IN), torch.ones(OUT, 1), 2.0)
    assert largest_in_rows(exact, 0.0) == pytest.approx(2.0)
    assert largest_in_columns(exact, 0.0) == pytest.approx(2.0 * np.sqrt(OUT))
