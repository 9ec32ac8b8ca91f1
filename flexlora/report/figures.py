"""Numbers -> SVG: pure functions, one per kind of figure.

Colours are CSS classes of the page (``c1``.. for models and stages, ``p1``.. for rank plans), so that one drawing
serves light, dark and paper. Every chart is drawn in a box of `WIDTH` units and scales with the page.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flexlora.report.tables import finite
from flexlora.text import number_text

WIDTH, HEIGHT = 520.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 508.0, 12.0, 232.0
MAX_MARKERS = 30
HEAT_LEVELS = 10
NOT_THERE = "//"
"""Stands for a missing value in `encode`."""

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_MAX_CODE = 4094

NumberText = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """What runs along the bottom of a line chart: its name, how a place on it is called, and how it is written."""

    name: str
    heading: NumberText
    write: NumberText
    is_whole: bool = True


ROUNDS = Axis("rounds", lambda x: f"Round {x:.0f}", lambda x: f"{x:.0f}")


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one level across it when ``is_level``."""

    name: str
    style: str
    points: Sequence[tuple[float, float | None]]
    is_level: bool = False

    @property
    def present(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True)
class LegendEntry:
    """One entry of a legend; ``value`` is the last one of the series, written out."""

    name: str
    style: str
    value: str
    is_level: bool = False


@dataclass(frozen=True)
class Reading:
    """What a chart says at one place: ``x`` in drawing units, a heading, and (style, name, value) lines."""

    x: float
    heading: str
    lines: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Chart:
    """A drawing with what the page says around it."""

    svg: Markup
    legend: Sequence[LegendEntry]
    readings: Sequence[Reading]
    description: str


@dataclass(frozen=True)
class Scale:
    """A straight or logarithmic way from values to drawing units."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value; values outside land on the edge."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        if self.is_log:
            value = math.log10(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


def ticks(low: float, high: float, count: int = 5, integers: bool = False) -> list[float]:
    """Return about ``count`` round numbers within ``low`` and ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if integers:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within ``low`` and ``high``, at most seven."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / 7))
    return [10.0**power for power in range(first, last + 1, stride)]


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
    y_low, y_high = _span(min(values), max(values), from_zero)
    x_scale = Scale(rounds[0], rounds[-1], LEFT, RIGHT)
    y_scale = Scale(y_low, y_high, BOTTOM, TOP)
    x_marks = ticks(rounds[0], rounds[-1], 6, axis.is_whole)
    x_write = axis.write if axis.is_whole else _plain(x_marks)
    body = [*_y_axis(ticks(y_low, y_high), y_scale), *_x_axis(x_marks, x_scale, x_write)]
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
    legend = [LegendEntry(line.name, line.style, write(line.present[-1][1]), line.is_level) for line in series]
    ends = "; ".join(
        f"{line.name} {write(line.present[-1][1])}"
        if line.is_level or len(line.present) == 1
        else f"{line.name} from {write(line.present[0][1])} to {write(line.present[-1][1])}"
        for line in series
    )
    description = f"{what}, {axis.name} {axis.write(rounds[0])} to {axis.write(rounds[-1])}: {ends}."
    return Chart(_svg(body), legend, readings, description)


def stacked_bars(
    columns: Sequence[tuple[int, Mapping[str, float]]],
    styles: Mapping[str, str],
    *,
    what: str,
    heading: str,
    write: NumberText,
    unit: float = 1.0,
    with_sums: bool = True,
) -> Chart | None:
    """Draw one bar per column, made of the parts named in ``styles``, bottom first; None when there is nothing.

    Args:
        columns: Number under the bar, and part -> size.
        styles: Part -> CSS class, in stacking order.
        what: The measure in words, for the description.
        heading: What a column is, with ``{}`` for its number: ``Round {}``.
        write: How a size is written in readings.
        unit: Sizes are divided by it for the labels of the vertical axis.
        with_sums: Put the sum over the columns into the legend.
    """
    totals = [sum(parts.values()) for _, parts in columns]
    if not columns or max(totals) <= 0:
        return None
    _, y_high = _span(0.0, max(totals) / unit, True)
    y_scale = Scale(0.0, y_high, BOTTOM, TOP)
    pitch = (RIGHT - LEFT) / len(columns)
    width = min(0.76 * pitch, 56.0)
    body = list(_y_axis(ticks(0.0, y_high), y_scale))
    every = max(1, math.ceil(len(columns) / 12))
    readings = []
    for index, (number, parts) in enumerate(columns):
        middle = LEFT + (index + 0.5) * pitch
        if index % every == 0:
            body.append(_text(middle, BOTTOM + 20, str(number), "middle"))
        below = 0.0
        for name, style in styles.items():
            size = parts.get(name, 0.0)
            if size <= 0:
                continue
            top, bottom = y_scale((below + size) / unit), y_scale(below / unit)
            below += size
            body.append(
                Markup('<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                    style, middle - width / 2, top, width, max(bottom - top, 0.5)
                )
            )
        lines = [(style, name, write(parts[name])) for name, style in styles.items() if parts.get(name, 0.0) > 0]
        readings.append(Reading(round(middle, 1), heading.format(number), lines[::-1]))
    whole = {name: sum(parts.get(name, 0.0) for _, parts in columns) for name in styles}
    legend = [
        LegendEntry(name, style, write(whole[name]) if with_sums else "")
        for name, style in styles.items()
        if whole[name] > 0
    ]
    sums = "; ".join(f"{name} {write(size)}" for name, size in whole.items() if size > 0)
    return Chart(_svg(body), legend, readings, f"{what}, {len(columns)} bars; in sum: {sums}.")


def dot_row(marks: Sequence[tuple[str, float | None]], low: float, high: float) -> Markup:
    """Draw values as dots on one small common scale, the last one largest, joined from first to last.

    Args:
        marks: Pairs of CSS class and value; missing values are left out.
        low: Value at the left edge.
        high: Value at the right edge.
    """
    scale = Scale(low, high, 6.0, 154.0)
    present = [(style, scale(value)) for style, value in marks if value is not None]
    body = [Markup('<line class="track" x1="4" x2="156" y1="9" y2="9"/>')]
    if len(present) > 1:
        body.append(
            Markup('<line class="reach" x1="{:.1f}" x2="{:.1f}" y1="9" y2="9"/>').format(present[0][1], present[-1][1])
        )
    for index, (style, x) in enumerate(present):
        radius = 5.5 if index == len(present) - 1 else 4.0
        body.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="9" r="{}"/>').format(style, x, radius))
    return Markup('<svg class="dots" viewBox="0 0 160 18" aria-hidden="true">{}</svg>').format(Markup().join(body))


def spectrum_chart(low: float, high: float, num_values: int, curves: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """Draw singular values over their index on a logarithmic axis.

    The page's script redraws the paths ``.curve`` when another module or round is chosen; the axes serve all.

    Args:
        low: Smallest value shown, positive; smaller ones lie on the lower edge.
        high: Largest value shown.
        num_values: Length of the horizontal axis.
        curves: Pairs of CSS class and values.
    """
    x_scale = Scale(1, max(num_values, 2), LEFT, RIGHT)
    y_scale = Scale(low, high, BOTTOM, TOP, is_log=True)
    body = [
        *_y_axis(log_ticks(low, high), y_scale, _power_of_ten),
        *_x_axis(_index_ticks(num_values), x_scale),
        Markup('<g class="ranks"></g>'),
    ]
    for style, values in curves:
        path = _path([(x_scale(k), y_scale(value)) for k, value in enumerate(values, start=1) if finite(value)])
        body.append(Markup('<path class="curve {}" d="{}"/>').format(style, path))
    return _svg(body)


def heatmap(rows: Sequence[str], columns: Sequence[int], shares: Sequence[Sequence[float | None]], top: float) -> Chart:
    """Draw one cell per row and column, darker for more; a missing share is an outlined cell.

    Args:
        rows: Labels.
        columns: Round numbers.
        shares: Per row, per column, a value between 0 and ``top``.
        top: Value of the darkest shade.
    """
    height = 15.0 if len(rows) <= 60 else 8.0
    label_every = 1 if height > 10 else 2
    left, right = 92.0, 516.0
    width = (right - left) / max(len(columns), 1)
    body = []
    for row, label in enumerate(rows):
        cells = [
            Markup('<rect class="{}" x="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                heat_class(share, top), left + column * width, max(width - 0.8, 0.6), height - 0.8
            )
            for column, share in enumerate(shares[row])
        ]
        if row % label_every == 0:
            cells.append(_text(left - 6, height - 4, label, "end"))
        body.append(Markup('<g transform="translate(0 {:.1f})">{}</g>').format(row * height, Markup().join(cells)))
    bottom = len(rows) * height
    every = max(1, math.ceil(len(columns) / 12))
    for column in range(0, len(columns), every):
        body.append(_text(left + (column + 0.5) * width, bottom + 15, str(columns[column]), "middle"))
    svg = Markup(
        '<svg class="heat" viewBox="0 0 520 {:.0f}" data-left="{}" data-cell="{:.4f}" data-row="{}">{}</svg>'
    ).format(bottom + 22, left, width, height, Markup().join(body))
    present = [share for line in shares for share in line if share is not None]
    description = f"{len(rows)} modules by {len(columns)} rounds"
    if present:
        description += f", from {100 * min(present):.1f} % to {100 * max(present):.1f} %"
    return Chart(svg, [], [], description)


def heat_class(share: float | None, top: float) -> str:
    """Return the CSS class of a cell, ``h0`` to ``h9``, or ``none``."""
    if share is None:
        return "none"
    return f"h{min(int(HEAT_LEVELS * share / top), HEAT_LEVELS - 1) if top > 0 else 0}"


def encode(values: Sequence[float | None], low: float, high: float) -> str:
    """Return values as two characters each, on a scale of 4,095 steps from ``low`` to ``high``."""
    return "".join(_encode_one(value, low, high) for value in values)


def sampled_indices(length: int, most: int = 48) -> list[int]:
    """Return at most about ``most`` 1-based indices up to ``length``: the first ones all, later ones ever sparser."""
    if length <= most:
        return list(range(1, length + 1))
    head = most // 3
    ratio = (length / head) ** (1 / (most - head))
    later = {min(length, round(head * ratio**step)) for step in range(1, most - head + 1)}
    return sorted({*range(1, head + 1), *later, length})


def _encode_one(value: float | None, low: float, high: float) -> str:
    if value is None or not math.isfinite(value):
        return NOT_THERE
    share = (value - low) / (high - low) if high > low else 0.0
    code = round(min(max(share, 0.0), 1.0) * _MAX_CODE)
    return _DIGITS[code // 64] + _DIGITS[code % 64]


def _span(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """Return the ends of an axis that holds ``low`` and ``high``, at round numbers."""
    if from_zero:
        low = min(low, 0.0)
    if not high > low:
        low, high = (low, low + 1.0) if from_zero else (low - 0.5, high + 0.5)
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _value_at(line: Series, x: float) -> float | None:
    if line.is_level:
        return line.present[0][1]
    points = line.present
    place = bisect.bisect_left(points, (x, -math.inf))
    return points[place][1] if place < len(points) and points[place][0] == x else None


def _line(line: Series, x_scale: Scale, y_scale: Scale) -> Markup:
    places = [(x_scale(x), y_scale(y)) for x, y in line.present]
    body = [Markup('<path class="line {}" d="{}"/>').format(line.style, _path(places))]
    if len(places) <= MAX_MARKERS:
        body += [
            Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(line.style, *at) for at in places
        ]
    return Markup().join(body)


def _level(line: Series, y_scale: Scale) -> Markup:
    y = y_scale(line.present[0][1])
    return Markup('<line class="line level {}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
        line.style, LEFT, RIGHT, y, y
    )


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(places))


def _y_axis(marks: Sequence[float], scale: Scale, write: NumberText | None = None) -> list[Markup]:
    write = write or _plain(marks)
    body = []
    for mark in marks:
        y = scale(mark)
        body.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, RIGHT, y, y))
        body.append(_text(LEFT - 8, y + 4.5, write(mark), "end"))
    return body


def _x_axis(marks: Sequence[float], scale: Scale, write: NumberText = ROUNDS.write) -> list[Markup]:
    axis = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, RIGHT, BOTTOM, BOTTOM)
    return [axis, *(_text(scale(mark), BOTTOM + 20, write(mark), "middle") for mark in marks)]


def _index_ticks(num_values: int) -> list[float]:
    return [1.0, *(mark for mark in ticks(0, max(num_values, 2), 6, True) if mark > 1)]


def _plain(marks: Sequence[float]) -> NumberText:
    steps = [abs(after - before) for before, after in itertools.pairwise(marks)]
    decimals = max(0, -math.floor(math.log10(min(steps)) + 1e-9)) if steps else 1
    if steps and round(min(steps) * 10**decimals, 6) % 1:
        decimals += 1
    return lambda value: number_text(value, decimals)


def _power_of_ten(value: float) -> str:
    power = round(math.log10(value))
    if -3 <= power <= 4:
        return f"{value:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _svg(body: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" aria-hidden="true">{}</svg>').format(
        WIDTH, HEIGHT, Markup().join(body)
    )
