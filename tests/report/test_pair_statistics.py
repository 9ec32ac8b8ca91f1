"""Statistics of paired differences against scipy, plain enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flexlora.report.pair_statistics import (
    draws_needed,
    flip_observed,
    flip_predicted,
    holm,
    pair_statistics,
    power,
    wilcoxon,
)


def sample(count: int, seed: int = 0, shift: float = 0.4) -> list[float]:
    return list(np.random.default_rng(seed).normal(shift, 1.0, count))


@pytest.mark.parametrize("count", [2, 3, 8, 21])
def test_interval_and_t_test_are_those_of_scipy(count: int) -> None:
    left, right = np.array(sample(count, 1)), np.array(sample(count, 2, 0.0))
    expected = stats.ttest_rel(left, right)
    found = pair_statistics(list(left - right))
    assert (found.p_t, found.p, found.test) == (pytest.approx(expected.pvalue), found.p_t, "t")
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert found.sd == pytest.approx(np.std(left - right, ddof=1))


@pytest.mark.parametrize("count", [2, 5, 8, 20])
def test_wilcoxon_without_ties_is_that_of_scipy(count: int) -> None:
    differences = sample(count, count)
    assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue, rel=1e-10)


@pytest.mark.parametrize("differences", [[1, 1, 2, -2, 3, 0], [1, 1, 1, 1], [-1, 2, 2, 2, 0, 0], [0.5, -0.5]])
def test_wilcoxon_with_ties_is_that_of_all_signs(differences: list[float]) -> None:
    present = np.array([value for value in differences if value])
    ranks = stats.rankdata(np.abs(present))
    sums = np.array([ranks @ np.array(signs) for signs in itertools.product([0, 1], repeat=len(ranks))])
    observed = ranks[present > 0].sum()
    least = min(observed, ranks.sum() - observed)
    expected = min(1.0, 2 * float(np.mean(sums <= least + 1e-9)))
    assert wilcoxon(differences) == pytest.approx(expected)


def test_holm_is_the_step_down_of_the_definition() -> None:
    # By hand: 4 x .005, then 3 x .01, 2 x .03 and 1 x .04, which may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_the_sequential_procedure_rejects(seed: int) -> None:
    p_values = list(np.random.default_rng(seed).beta(0.3, 3, 12))
    order = np.argsort(p_values)
    rejected = set()
    for place, index in enumerate(order):
        if p_values[index] > 0.05 / (len(p_values) - place):
            break
        rejected.add(int(index))
    assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


def test_flips_are_counted_over_all_sets_of_three() -> None:
    # Sets of three of (3, 3, -2, -1): 3+3-2, 3+3-1 positive; 3-2-1 = 0, twice, counts half each.
    assert flip_observed([3, 3, -2, -1]) == pytest.approx(0.25)
    differences = sample(9, 4, 0.3)
    total = sum(differences)
    flips = [sum(chosen) * total < 0 for chosen in itertools.combinations(differences, 3)]
    assert flip_observed(differences) == pytest.approx(np.mean(flips))
    assert flip_observed([1.0, 2.0, 3.0]) is None


def test_predicted_flips_are_those_of_drawing_mean_and_spread_from_what_is_known() -> None:
    mean, sd, count = 0.5, 1.0, 8
    rng = np.random.default_rng(3)
    size = 400_000
    spread = sd * np.sqrt((count - 1) / rng.chisquare(count - 1, size))
    new = rng.normal(rng.normal(mean, spread / math.sqrt(count)), spread / math.sqrt(3))
    assert flip_predicted(mean, sd, count) == pytest.approx(np.mean(new < 0), abs=0.003)


@pytest.mark.parametrize("count", [2, 5, 8, 40])
@pytest.mark.parametrize("effect", [0.1, 0.5, 1.0, 2.0])
def test_power_is_that_of_the_non_central_t(effect: float, count: int) -> None:
    critical = stats.t.ppf(0.975, count - 1)
    expected = stats.nct.sf(critical, count - 1, effect * math.sqrt(count))
    lower = stats.nct.cdf(-critical, count - 1, effect * math.sqrt(count))
    assert power(effect, count) == pytest.approx(expected + (lower if math.isfinite(lower) else 0.0), abs=1e-9)


def test_power_has_no_gaps_at_large_effects() -> None:
    values = [power(effect, 8) for effect in np.linspace(0, 400, 300)]
    assert values[0] == 0.05 and values[-1] == pytest.approx(1.0)
    assert all(math.isfinite(value) for value in values)
    assert np.all(np.diff(values) >= -1e-9)


@pytest.mark.parametrize(("effect", "draws"), [(0.5, 34), (0.8, 15), (0.2, 199), (1.0, 10)])
def test_draws_needed_are_those_of_published_tables(effect: float, draws: int) -> None:
    # G*Power, difference between two dependent means, two-sided, alpha .05, power .8.
    assert draws_needed(effect) == draws


@pytest.mark.parametrize("effect", [0.02, 0.3, 3.0, 50.0])
def test_one_draw_less_than_needed_is_too_few(effect: float) -> None:
    draws = draws_needed(effect)
    assert draws is not None
    assert power(effect, draws) >= 0.8
    assert draws == 2 or power(effect, draws - 1) < 0.8


def test_differences_too_small_to_tell_have_no_number_of_draws() -> None:
    assert draws_needed(0.0) is None
    assert draws_needed(1e-6) is None


def test_one_draw_says_no_more_than_its_difference() -> None:
    found = pair_statistics([0.25])
    assert (found.num_pairs, found.mean) == (1, 0.25)
    assert {found.sd, found.low, found.high, found.p, found.power, found.draws_needed, found.flip_observed} == {None}


def test_two_draws_have_the_interval_of_one_degree_of_freedom() -> None:
    found = pair_statistics([1.0, 2.0])
    # t(0.975, 1) = tan(0.475 pi); standard error 0.5.
    assert found.high == pytest.approx(1.5 + 0.5 * math.tan(0.475 * math.pi))
    assert found.p == pytest.approx(1 - 2 * math.atan(3.0) / math.pi)
    assert found.flip_observed is None and found.flip_predicted is not None


def test_equal_arms_are_equal() -> None:
    found = pair_statistics([0.0] * 5)
    assert (found.mean, found.low, found.high, found.p, found.p_wilcoxon) == (0.0, 0.0, 0.0, 1.0, 1.0)
    assert (found.power, found.draws_needed, found.flip_observed) == (None, None, None)
    assert found.is_constant


def test_equal_differences_are_judged_by_their_signs_alone() -> None:
    found = pair_statistics([0.1 + 0.2 - 0.3 + 0.5, 0.5, 0.5, 0.5, 0.5])
    # Five of one sign: 2 / 2**5.
    assert (found.p, found.test, found.p_t, found.is_constant) == (pytest.approx(0.0625), "wilcoxon", None, True)
    assert (found.flip_observed, found.power) == (0.0, 1.0)
