"""Truncation errors against an SVD, and what the page holds against the records."""

import numpy as np
import pytest

from flexlora.report.spectra import truncation_error
from flexlora.rounds.records import RoundRecord, SpectrumRecord


@pytest.mark.parametrize("rank", [0, 1, 3, 6, 9])
def test_truncation_error_is_the_distance_to_the_best_approximation(rank: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(9, 6))
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    approximation = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    expected = np.linalg.norm(matrix - approximation) / np.linalg.norm(matrix)
    cut = SpectrumRecord(singular_values=S[:4].tolist(), tail=float(np.linalg.norm(S[4:])))
    whole = SpectrumRecord(singular_values=S.tolist())
    assert truncation_error(whole, rank) == pytest.approx(expected, abs=1e-12)
    if rank <= 4:
        assert truncation_error(cut, rank) == pytest.approx(expected, abs=1e-12)


def test_a_change_that_is_zero_or_broken_has_no_truncation_error(broken_numbers: RoundRecord) -> None:
    assert truncation_error(SpectrumRecord(singular_values=[0.0, 0.0]), 1) is None
    assert truncation_error(broken_numbers.spectra["a.q_proj"], 1) is None
