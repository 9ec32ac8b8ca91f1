"""Draws values over rounds, or along another axis, as lines and levels."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flexlora.report.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Chart,
    LegendEntry,
    Reading,
    path_through,
    whole_drawing,
    x_axis,
    y_axis,
)
from flexlora.report.scales import NumberText, Scale, axis_range, mark_writer, ticks
from flexlora.text import number_text

MAX_MARKERS = 30


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a line chart: its name, and how a place on it is called and written.

    Attributes:
        marks: Places with a mark; None chooses round numbers.
    """

    name: str
    heading: NumberText
    write: NumberText
    is_whole: bool = True
    marks: Sequence[float] | None = None


ROUNDS = Axis("rounds", lambda x: f"Round {x:.0f}", lambda x: f"{x:.0f}")


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one level across it when ``is_level``.

    Attributes:
        band: (place, low, high) along the line, shaded.
        ring: A point to stand out.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float | None]]
    is_level: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    ring: tuple[float, float] | None = None

    @property
    def present(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]

    @property
    def shown_value(self) -> float:
        """The value that the legend gives: that of the ring, or else the last one."""
        return self.ring[1] if self.ring is not None else self.present[-1][1]


def line_chart(
    series: Sequence[Series], *, what: str, from_zero: bool, write: NumberText = number_text, axis: Axis = ROUNDS
) -> Chart | None:
    """Draw values over rounds, or along another axis; None when nothing can be drawn.

    Args:
        series: Lines and levels; missing and non-finite values are left out, their neighbours joined.
        what: The measure in words, for the description.
        from_zero: Start the vertical axis at 0. Otherwise it spans the values.
        write: How a value is written in the legend and the readings.
        axis: What the places of the points are.
    """
    series = [line for line in series if line.present]
    if not series:
        return None
    rounds = sorted({x for line in series if not line.is_level for x, _ in line.present}) or [0.0, 1.0]
    values = [y for line in series for _, y in line.present]
    values += [end for line in series for _, *ends in line.band for end in ends]
    y_low, y_high = axis_range(min(values), max(values), from_zero)
    x_scale = Scale(rounds[0], rounds[-1], LEFT, RIGHT)
    y_scale = Scale(y_low, y_high, BOTTOM, TOP)
    x_marks = ticks(rounds[0], rounds[-1], 6, axis.is_whole) if axis.marks is None else axis.marks
    x_write = axis.write if axis.is_whole or axis.marks is not None else mark_writer(x_marks)
    body = [*y_axis(ticks(y_low, y_high), y_scale), *x_axis(x_marks, x_scale, x_write)]
    body += [_band(line, x_scale, y_scale) for line in series if line.band]
    for line in sorted(series, key=lambda line: not line.is_level):
        body.append(_level(line, y_scale) if line.is_level else _line(line, x_scale, y_scale))
    readings = [
        Reading(
            round(x_scale(x), 1),
            axis.heading(x),
            [(line.style, line.name, write(y)) for line in series if (y := _value_at(line, x)) is not None],
        )
        for x in rounds
    ]
    legend = [LegendEntry(line.name, line.style, write(line.shown_value), line.is_level) for line in series]
    ends = "; ".join(
        f"{line.name} {write(line.present[-1][1])}"
        if line.is_level or len(line.present) == 1
        else f"{line.name} from {write(line.present[0][1])} to {write(line.present[-1][1])}"
        for line in series
    )
    description = f"{what}, {axis.name} {axis.write(rounds[0])} to {axis.write(rounds[-1])}: {ends}."
    return Chart(whole_drawing(body), legend, readings, description)


def _value_at(line: Series, x: float) -> float | None:
    if line.is_level:
        return line.present[0][1]
    points = line.present
    place = bisect.bisect_left(points, (x, -math.inf))
    return points[place][1] if place < len(points) and points[place][0] == x else None


def _line(line: Series, x_scale: Scale, y_scale: Scale) -> Markup:
    places = [(x_scale(x), y_scale(y)) for x, y in line.present]
    body = [Markup('<path class="line {}" d="{}"/>').format(line.style, path_through(places))]
    if len(places) <= MAX_MARKERS:
        body += [
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(line.style, *at) for at in places
        ]
    if line.ring is not None:
        x, y = line.ring
        body.append(
            Markup('<circle class="ring {}" cx="{:.1f}" cy="{:.1f}" r="7"/>').format(line.style, x_scale(x), y_scale(y))
        )
    return Markup().join(body)


def _band(line: Series, x_scale: Scale, y_scale: Scale) -> Markup:
    upper = [(x_scale(x), y_scale(high)) for x, _, high in line.band]
    lower = [(x_scale(x), y_scale(low)) for x, low, _ in reversed(line.band)]
    return Markup('<path class="band {}" d="{}Z"/>').format(line.style, path_through([*upper, *lower]))


def _level(line: Series, y_scale: Scale) -> Markup:
    y = y_scale(line.present[0][1])
    return Markup('<line class="line level {}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
        line.style, LEFT, RIGHT, y, y
    )
