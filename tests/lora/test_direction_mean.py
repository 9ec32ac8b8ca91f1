"""Means of changes by direction are those of a loop over numpy arrays."""

import numpy as np
import pytest
import torch

from flexlora.lora.direction_mean import mean_directions
from flexlora.lora.factors import FactorsError, LoraFactors

SHAPE = (7, 11)
RANK = 4


def factors(rank: int, seed: int, scaling: float) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, SHAPE[1], generator=generator, dtype=torch.float64)
    B = torch.randn(SHAPE[0], rank, generator=generator, dtype=torch.float64)
    return LoraFactors(A, B, scaling)


CLIENTS = [(1, 2.0, 3.0), (4, 0.5, 1.0), (2, 1.0, 2.0), (2, 1.0, 0.5)]
"""Rank, scaling and weight of each client."""


def updates() -> list[tuple[dict[str, LoraFactors], float]]:
    return [({"m": factors(rank, 10 + i, scaling)}, weight) for i, (rank, scaling, weight) in enumerate(CLIENTS)]


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("step", [1.0, 0.3])
def test_each_direction_moves_by_the_weighted_change_over_the_power_of_its_coverage(
    exponent: float, step: float
) -> None:
    start = factors(RANK, 1, 1.0)
    moved = mean_directions({"m": start}, updates(), exponent, step)["m"]
    total = sum(weight for _, _, weight in CLIENTS)
    for j in range(RANK):
        row, column, held = np.zeros(SHAPE[1]), np.zeros(SHAPE[0]), 0.0
        for (rank, scaling, weight), (payload, _) in zip(CLIENTS, updates(), strict=True):
            if rank > j:
                row += weight / total * (payload["m"].A[j].numpy() - start.A[j].numpy())
                column += weight / total * (scaling * payload["m"].B[:, j].numpy() - start.B[:, j].numpy())
                held += weight / total
        np.testing.assert_allclose(moved.A[j], start.A[j].numpy() + step * row / held**exponent, rtol=1e-12)
        np.testing.assert_allclose(moved.B[:, j], start.B[:, j].numpy() + step * column / held**exponent, rtol=1e-12)


def test_what_nobody_holds_stays_as_it_is() -> None:
    start = {"m": factors(RANK, 1, 1.0), "other": factors(RANK, 2, 1.0)}
    moved = mean_directions(start, [({"m": factors(2, 3, 1.0)}, 1.0)], 1.0)
    assert torch.equal(moved["m"].A[2:], start["m"].A[2:])
    assert torch.equal(moved["m"].B[:, 2:], start["m"].B[:, 2:])
    assert torch.equal(moved["other"].A, start["other"].A)


def test_a_module_that_a_client_lacks_still_counts_its_weight_in_the_mean_of_all() -> None:
    start = {"m": factors(1, 1, 1.0)}
    alone = mean_directions(start, [({"m": factors(1, 3, 1.0)}, 1.0), ({}, 3.0)], 0.0)["m"]
    expected = start["m"].A.numpy() + 0.25 * (factors(1, 3, 1.0).A.numpy() - start["m"].A.numpy())
    np.testing.assert_allclose(alone.A, expected, rtol=1e-12)


def test_the_mean_of_holders_at_one_rank_is_the_plain_mean() -> None:
    start = factors(2, 1, 1.0)
    payloads = [({"m": factors(2, seed, 2.0)}, float(seed)) for seed in (3, 4, 5)]
    moved = mean_directions({"m": start}, payloads, 1.0)["m"]
    expected = np.average([p["m"].A.numpy() for p, _ in payloads], axis=0, weights=[w for _, w in payloads])
    np.testing.assert_allclose(moved.A, expected, rtol=1e-12)


def test_ranks_modules_and_weights_that_cannot_be_averaged_are_refused() -> None:
    start = {"m": factors(2, 1, 1.0)}
    with pytest.raises(FactorsError, match=r"rank must be in 0\.\.2"):
        mean_directions(start, [({"m": factors(3, 1, 1.0)}, 1.0)], 1.0)
    with pytest.raises(FactorsError, match="other: rank"):
        mean_directions(start, [({"other": factors(1, 1, 1.0)}, 1.0)], 1.0)
    with pytest.raises(FactorsError, match="more than 0"):
        mean_directions(start, [], 1.0)
