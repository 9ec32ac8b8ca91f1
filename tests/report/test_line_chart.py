"""What line charts leave out, and what they say at each place."""

import math
import re

from flexlora.report.line_chart import Series, line_chart


def test_missing_rounds_are_joined_and_broken_values_left_out() -> None:
    series = Series("scores", "c1", [(0, 1.0), (1, None), (2, math.nan), (3, 4.0)])
    chart = line_chart([series], what="Score", from_zero=True)
    assert chart
    assert chart.svg.count("<circle") == 2
    assert re.search(r'd="M[\d. ]+L[\d. ]+"', chart.svg)
    assert [reading.heading for reading in chart.readings] == ["Round 0", "Round 3"]
    assert chart.description == "Score, rounds 0 to 3: scores from 1.0 to 4.0."


def test_levels_are_read_at_every_round() -> None:
    lines = [Series("run", "c1", [(0, 1.0), (1, 2.0)]), Series("base", "c6", [(0, 0.5)], is_level=True)]
    chart = line_chart(lines, what="Score", from_zero=True)
    assert chart
    assert [line[2] for reading in chart.readings for line in reading.lines] == ["1.0", "0.5", "2.0", "0.5"]


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart([Series("x", "c1", [(0, None), (1, math.inf)])], what="", from_zero=True) is None


def test_a_band_widens_the_axis_and_a_ring_marks_its_point() -> None:
    line = Series("a", "c1", [(1, 1.0), (2, 1.5)], band=[(1, 0.5, 1.5), (2, 1.0, 4.0)], ring=(1, 1.0))
    chart = line_chart([line], what="Loss", from_zero=False)
    assert chart is not None
    assert chart.svg.count('class="band c1"') == 1 and chart.svg.count('class="ring c1"') == 1
    assert ">4</text>" in chart.svg
    # The legend gives the value of the ring, not the last one.
    assert chart.legend[0].value == "1.0"
