"""Intervals of differences over tasks, against scipy's bootstrap; and nothing said where units are few."""

import numpy as np
import pytest
from scipy import stats

from flexlora.report.task_differences import Difference, interval_text, paired_difference, tally, task_difference
from flexlora.rounds.records import TaskScoreRecord


def scores(values: list[float], sizes: list[int] | None = None) -> dict[str, TaskScoreRecord]:
    sizes = sizes or [4] * len(values)
    return {
        f"task {place}": TaskScoreRecord(rouge_l=value, num_examples=size)
        for place, (value, size) in enumerate(zip(values, sizes, strict=True))
    }


@pytest.mark.parametrize("num_tasks", [8, 64])
def test_the_interval_is_that_of_scipys_paired_bootstrap(num_tasks: int) -> None:
    rng = np.random.default_rng(3)
    first = rng.normal(50, 20, num_tasks)
    second = first - rng.normal(2, 5, num_tasks)
    sizes = rng.integers(1, 9, num_tasks)
    found = task_difference(scores(first.tolist(), sizes.tolist()), scores(second.tolist(), sizes.tolist()))

    def mean(a: np.ndarray, b: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.sum(w * (a - b), axis=axis) / np.sum(w, axis=axis)

    expected = stats.bootstrap(
        (first, second, sizes), mean, paired=True, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found is not None
    assert found.value == pytest.approx(np.average(first - second, weights=sizes))
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)


def test_two_models_that_are_alike_are_told_apart_in_one_of_twenty_draws() -> None:
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(200):
        gains = rng.normal(0, 10, 40)
        found = paired_difference([(gain, 0.0, 1.0) for gain in gains], 8)
        assert found is not None
        told += found.is_told
    # 5 % of 200 are 10; a binomial with that mean is above 22 once in 4,000 times.
    assert told <= 22


def test_few_tasks_other_tasks_and_scores_that_are_no_numbers_have_no_interval() -> None:
    eight = [float(number) for number in range(8)]
    assert task_difference(scores(eight), scores(eight[::-1])) is not None
    assert task_difference(scores(eight[:7]), scores(eight[:7])) is None
    assert task_difference(scores(eight), scores([*eight, 8.0])) is None
    assert task_difference(scores([*eight, float("nan")]), scores([*eight, 1.0])) is None
    assert task_difference({}, {}) is None


def test_the_same_scores_give_the_same_interval_every_time() -> None:
    first, second = scores([1.0, 5.0, 2.0, 9.0, 4.0, 3.0, 8.0, 0.0]), scores([0.0] * 8)
    assert task_difference(first, second) == task_difference(first, second)


def test_an_interval_is_written_with_both_signs() -> None:
    assert interval_text(Difference(1.0, -0.5, 2.25, 9)) == "−0.5 to +2.2"
    assert interval_text(None) == ""


def test_tasks_are_counted_by_who_is_ahead() -> None:
    found = tally(scores([3.0, 1.0, 2.0, 7.0]), scores([1.0, 4.0, 2.0, 8.0]))
    assert found is not None
    assert (found.num_gained, found.num_lost, found.num_equal) == (1, 2, 1)
    assert found.worst == [("task 1", -3.0), ("task 3", -1.0)]
    assert tally({}, {}) is None
