"""Marks of axes and places on them."""

import math

import pytest

from flexlora.report.scales import Scale, ticks


@pytest.mark.parametrize(("low", "high"), [(0, 41.3), (1.52, 2.8), (0.0, 0.0007), (-3.0, 12.0), (0.0, 5e9)])
def test_ticks_are_few_round_numbers_inside(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 7
    assert low - 1e-9 <= marks[0]
    assert marks[-1] <= high * (1 + 1e-9)
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step)), 6) in {1, 2, 2.5, 5, 10}


def test_round_ticks_are_whole_numbers() -> None:
    assert ticks(0, 3, 6, integers=True) == [0, 1, 2, 3]
    assert ticks(4, 4, 6, integers=True) == [4]


def test_a_scale_ends_where_it_should_and_holds_everything() -> None:
    scale = Scale(0.01, 10, 200, 20, is_log=True)
    assert scale(0.01) == pytest.approx(200)
    assert scale(10) == pytest.approx(20)
    assert scale(0.1) == pytest.approx(140)
    assert scale(0) == pytest.approx(200)
    assert scale(1e6) == pytest.approx(20)
