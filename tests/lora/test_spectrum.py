import numpy as np
import pytest
import scipy.linalg
import torch

from flexlora.lora.product import Spectrum
from flexlora.lora.spectrum import (
    directions_holding,
    effective_rank,
    energy_kept,
    principal_angles,
    share_inside,
    truncation_error,
)


def of_values(values: list[float], tail: float = 0.0) -> Spectrum:
    k = len(values)
    return Spectrum(
        torch.eye(6, k, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        torch.eye(k, 5, dtype=torch.float64),
        tail,
    )


def test_truncation_error_and_energy_count_the_discarded_tail():
    spectrum = of_values([4.0, 2.0], tail=2.0)  # 16 + 4 + 4
    assert truncation_error(spectrum, 1) == pytest.approx(8**0.5)
    assert truncation_error(spectrum, 7) == pytest.approx(2)
    assert energy_kept(spectrum, 1) == pytest.approx(16 / 24)
    assert energy_kept(spectrum, 7) == pytest.approx(20 / 24)


@pytest.mark.parametrize(
    ("energy", "expected"),
    [(0.01, 1), (0.5, 1), (0.64, 1), (0.65, 2), (0.96, 2), (0.97, 3), (1.0, 3)],  # squares 64 / 32 / 4 / 0 of 100
)
def test_the_fewest_directions_that_hold_a_share_of_the_squares_are_found(energy, expected):
    # The tail of an earlier truncation is no longer there to be held.
    assert directions_holding(of_values([8.0, 32**0.5, 2.0, 0.0], tail=9.0), energy) == expected


def test_equal_directions_are_all_needed_and_the_zero_change_needs_none():
    assert directions_holding(of_values([3.0, 3.0, 3.0]), 0.7) == 3
    assert directions_holding(of_values([0.1, 0.1, 0.1]), 1.0) == 3
    assert directions_holding(of_values([]), 1.0) == directions_holding(of_values([0.0, 0.0]), 0.5) == 0


def test_the_zero_change_keeps_all_energy_and_has_effective_rank_zero():
    assert energy_kept(of_values([]), 1) == 1
    assert effective_rank(of_values([])) == 0
    assert effective_rank(of_values([0.0, 0.0])) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 3.0, 3.0], 3), ([5.0, 0.0], 1), ([2.0, 1.0, 1.0], 2**1.5)],  # entropy of 1/2 1/4 1/4 is 1.5 bits
)
def test_effective_rank_is_the_exponential_of_the_entropy(values, expected):
    assert effective_rank(of_values(values)) == pytest.approx(expected)


@pytest.mark.parametrize(("k", "m"), [(3, 3), (2, 4), (4, 2)])
def test_principal_angles_agree_with_scipy(k, m):
    rng = np.random.default_rng(0)
    rows, other = rng.standard_normal((k, 9)), rng.standard_normal((m, 9))
    found = principal_angles(torch.tensor(rows), torch.tensor(other))
    np.testing.assert_allclose(found.numpy(), np.sort(scipy.linalg.subspace_angles(rows.T, other.T)), rtol=1e-10)


def test_principal_angles_resolve_small_and_right_angles():
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64)
    other = torch.tensor([[1.0, 0, 1e-9, 0], [0, 0, 0, 1]], dtype=torch.float64)
    np.testing.assert_allclose(principal_angles(rows, other).numpy(), [1e-9, np.pi / 2], rtol=1e-6)


def test_the_share_inside_ranks_is_that_of_the_squares_of_all_modules():
    spectra = {"a": of_values([2.0, 1.0]), "b": of_values([3.0], tail=1.0)}  # 4 + 1 + 9 + 1
    assert share_inside(spectra, {"a": 1, "b": 1}) == pytest.approx(13 / 15)
    assert share_inside(spectra, {"a": 5}) == pytest.approx(5 / 15)
    assert share_inside({"a": of_values([0.0])}, {"a": 1}) == 1
