"""Draws what all charts share, as SVG: the box, its axes, labels and paths.

Colours are CSS classes of the page (``c1``.. for models and stages, ``p1``.. for rank plans), so that one drawing
serves light, dark and paper. Every chart is drawn in a box of `WIDTH` units and scales with the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flexlora.report.scales import NumberText, Scale, mark_writer

WIDTH, HEIGHT = 520.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 508.0, 12.0, 232.0


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


def y_axis(marks: Sequence[float], scale: Scale, write: NumberText | None = None) -> list[Markup]:
    """Return a grid line with its label for each mark."""
    write = write or mark_writer(marks)
    body = []
    for mark in marks:
        y = scale(mark)
        body.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, RIGHT, y, y))
        body.append(label(LEFT - 8, y + 4.5, write(mark), "end"))
    return body


def x_axis(marks: Sequence[float], scale: Scale, write: NumberText = "{:.0f}".format) -> list[Markup]:
    """Return the line along the bottom and the label of each mark."""
    axis = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, RIGHT, BOTTOM, BOTTOM)
    return [axis, *(label(scale(mark), BOTTOM + 20, write(mark), "middle") for mark in marks)]


def path_through(places: Sequence[tuple[float, float]]) -> str:
    """Return the path that joins places with straight lines, as the ``d`` of an SVG path."""
    return "".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(places))


def label(x: float, y: float, words: str, anchor: str) -> Markup:
    """Return words at a place; ``anchor`` says which part of them lies there: start, middle or end."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def whole_drawing(body: Sequence[Markup]) -> Markup:
    """Return a whole drawing, hidden from screen readers: they get the description of the chart."""
    return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" aria-hidden="true">{}</svg>').format(
        WIDTH, HEIGHT, Markup().join(body)
    )
