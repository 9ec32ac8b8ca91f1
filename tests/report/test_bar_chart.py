"""Heights of bars, and what they say."""

import re

import pytest

from flexlora.report.bar_chart import stacked_bars


def test_nothing_to_draw_is_no_chart() -> None:
    assert stacked_bars([], {"a": "c1"}, what="", heading="{}", write=str) is None
    assert stacked_bars([(1, {"a": 0.0})], {"a": "c1"}, what="", heading="{}", write=str) is None


def test_bars_have_heights_in_proportion() -> None:
    chart = stacked_bars(
        [(1, {"a": 10.0, "b": 30.0}), (2, {"b": 20.0})],
        {"a": "p1", "b": "p2"},
        what="Size",
        heading="Round {}",
        write=lambda v: f"{v:g}",
    )
    assert chart
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', chart.svg)]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.2)
    assert heights[2] == pytest.approx(2 * heights[0], abs=0.2)
    assert chart.readings[0].lines == [("p2", "b", "30"), ("p1", "a", "10")]
    assert [entry.value for entry in chart.legend] == ["10", "50"]
