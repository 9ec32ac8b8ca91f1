"""Dots on a small scale."""

import re

import pytest

from flexlora.report.dot_row import dot_row


def test_dots_lie_in_proportion_and_the_last_is_largest() -> None:
    drawing = dot_row([("c6", 0.0), ("c2", None), ("c3", 25.0), ("c1", 100.0)], 0.0, 100.0)
    dots = [
        (name, float(x), float(radius))
        for name, x, radius in re.findall(r'dot (\w+)" cx="(.*?)".*? r="(.*?)"', drawing)
    ]
    (_, left, _), (_, quarter, _), (_, right, largest) = dots
    assert [name for name, _, _ in dots] == ["c6", "c3", "c1"]
    assert quarter - left == pytest.approx((right - left) / 4)
    assert largest == max(radius for *_, radius in dots) and sorted({radius for *_, radius in dots})[0] < largest


def test_without_values_there_is_only_the_track() -> None:
    assert dot_row([("c1", None)], 0.0, 1.0).count("<line") == 1
