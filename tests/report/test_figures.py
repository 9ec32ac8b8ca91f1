"""Drawings: what is left out, where things lie, and that no name can break out of them."""

import math
import re

import pytest

from flexlora.report import figures
from flexlora.report.figures import Scale, Series


def decode(code: str, low: float, high: float) -> float | None:
    """What the page's script does, written again from its description."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 64 * digits.index(code[0]) + digits.index(code[1])
    return None if number == 4095 else low + (high - low) * number / 4094


@pytest.mark.parametrize(("low", "high"), [(0, 41.3), (1.52, 2.8), (0.0, 0.0007), (-3.0, 12.0), (0.0, 5e9)])
def test_ticks_are_few_round_numbers_inside(low: float, high: float) -> None:
    marks = figures.ticks(low, high)
    assert 2 <= len(marks) <= 7
    assert low - 1e-9 <= marks[0]
    assert marks[-1] <= high * (1 + 1e-9)
    step = marks[1] - marks[0]
    assert round(step / 10 ** math.floor(math.log10(step)), 6) in {1, 2, 2.5, 5, 10}


def test_round_ticks_are_whole_numbers() -> None:
    assert figures.ticks(0, 3, 6, integers=True) == [0, 1, 2, 3]
    assert figures.ticks(4, 4, 6, integers=True) == [4]


def test_a_scale_ends_where_it_should_and_holds_everything() -> None:
    scale = Scale(0.01, 10, 200, 20, is_log=True)
    assert scale(0.01) == pytest.approx(200)
    assert scale(10) == pytest.approx(20)
    assert scale(0.1) == pytest.approx(140)
    assert scale(0) == pytest.approx(200)
    assert scale(1e6) == pytest.approx(20)


def test_missing_rounds_are_joined_and_broken_values_left_out() -> None:
    series = Series("scores", "c1", [(0, 1.0), (1, None), (2, math.nan), (3, 4.0)])
    chart = figures.line_chart([series], what="Score", from_zero=True)
    assert chart
    assert chart.svg.count("<circle") == 2
    assert re.search(r'd="M[\d. ]+L[\d. ]+"', chart.svg)
    assert [reading.heading for reading in chart.readings] == ["Round 0", "Round 3"]
    assert chart.description == "Score, rounds 0 to 3: scores from 1.0 to 4.0."


def test_levels_are_read_at_every_round() -> None:
    lines = [Series("run", "c1", [(0, 1.0), (1, 2.0)]), Series("base", "c6", [(0, 0.5)], is_level=True)]
    chart = figures.line_chart(lines, what="Score", from_zero=True)
    assert chart
    assert [line[2] for reading in chart.readings for line in reading.lines] == ["1.0", "0.5", "2.0", "0.5"]


def test_nothing_to_draw_is_no_chart() -> None:
    assert figures.line_chart([Series("x", "c1", [(0, None), (1, math.inf)])], what="", from_zero=True) is None
    assert figures.stacked_bars([], {"a": "c1"}, what="", heading="{}", write=str) is None
    assert figures.stacked_bars([(1, {"a": 0.0})], {"a": "c1"}, what="", heading="{}", write=str) is None


def test_bars_have_heights_in_proportion() -> None:
    chart = figures.stacked_bars(
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


def test_names_are_escaped() -> None:
    heat = figures.heatmap(["<script>"], [1], [[0.5]], 1.0)
    assert "<script>" not in heat.svg
    assert "&lt;script&gt;" in heat.svg


def test_heat_has_ten_shades_and_an_outline_for_nothing() -> None:
    assert [figures.heat_class(share, 0.5) for share in (0.0, 0.049, 0.05, 0.5, None)] == [
        "h0",
        "h0",
        "h1",
        "h9",
        "none",
    ]


@pytest.mark.parametrize("value", [-8.0, -3.2, 0.0, 1.9999, 2.0])
def test_encoded_values_come_back_within_half_a_step(value: float) -> None:
    back = decode(figures.encode([value], -8.0, 2.0), -8.0, 2.0)
    assert back == pytest.approx(value, abs=10 / 4094 / 2 + 1e-12)


def test_values_that_are_missing_or_broken_are_encoded_as_missing() -> None:
    codes = figures.encode([None, math.nan, 5.0], 0.0, 1.0)
    assert [decode(codes[place : place + 2], 0.0, 1.0) for place in (0, 2, 4)] == [None, None, 1.0]


@pytest.mark.parametrize("length", [0, 1, 48, 49, 200, 4096])
def test_sampled_indices_keep_the_first_the_last_and_the_order(length: int) -> None:
    indices = figures.sampled_indices(length)
    assert indices == sorted(set(indices))
    assert len(indices) <= 49
    assert indices[:16] == list(range(1, min(length, 16) + 1))
    assert indices[-1:] == ([length] if length else [])
