import math

import pytest

from flexlora.training.schedule import learning_rate_at


def rates(**settings):
    return [learning_rate_at(number, base=1.0, num_rounds=8, **settings) for number in range(1, 9)]


def test_learning_rates_follow_their_schedules():
    assert rates(schedule="constant") == [1.0] * 8
    assert rates(schedule="halve", halve_at=(2, 5)) == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert rates(schedule="linear") == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = rates(schedule="cosine")
    assert cosine[0] == 1.0
    assert cosine[4] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 0.05


def test_warm_up_rises_in_equal_steps_before_the_schedule():
    assert rates(schedule="constant", warmup_rounds=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    linear = rates(schedule="linear", warmup_rounds=4)
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])


def test_rates_fall_to_the_final_one_where_they_fall():
    assert rates(schedule="linear", final=0.2) == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    # Half a period of the cosine between both rates, written with squares: 0.2 + 0.8 cos^2(x / 2).
    expected = [0.2 + 0.8 * math.cos(math.pi * number / 16) ** 2 for number in range(8)]
    assert rates(schedule="cosine", final=0.2) == pytest.approx(expected)
    assert rates(schedule="constant", final=0.2) == [1.0] * 8
    # An arm with a lower rate than the final one stays where it is.
    assert rates(schedule="linear", final=3.0) == [1.0] * 8
