"""Draws paired differences with their intervals, one row an arm."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from flexlora.report.drawing import RIGHT, WIDTH, Chart, LegendEntry, label
from flexlora.report.scales import Scale, axis_range, mark_writer, ticks
from flexlora.text import signed_text

ROW, HEAD, FOOT = 22.0, 8.0, 44.0
NAMES, NUMBERS = 132.0, 62.0
"""Room for the names on the left and the numbers on the right."""

LONGEST_NAME = 20
EFFECTS = {
    "better": "better than the reference (corrected p < 0.05)",
    "worse": "worse",
    "open": "not told apart",
}


@dataclass(frozen=True)
class Difference:
    """One row: a mean difference with its interval.

    Attributes:
        effect: `EFFECTS` names the values; it is the CSS class too.
        is_bound: Drawn hollow: out of reach.
        is_far: Does not widen the axis; an arrow shows where it lies.
    """

    name: str
    mean: float
    low: float | None
    high: float | None
    effect: str
    is_bound: bool = False
    is_far: bool = False


def forest_chart(rows: Sequence[Difference], *, what: str, digits: int, lower_is_better: bool) -> Chart | None:
    """Draw the rows in the order given around a line at zero; None when there are none.

    Args:
        rows: What is drawn.
        what: The measure in words, for the description.
        digits: Decimals of the numbers.
        lower_is_better: Which side of zero is marked as better.
    """
    if not rows:
        return None
    near = [row for row in rows if not row.is_far] or rows
    ends = [end for row in near for end in (row.low, row.mean, row.high) if end is not None]
    low, high = axis_range(min(0.0, *ends), max(0.0, *ends), False)
    scale = Scale(low, high, NAMES, RIGHT - NUMBERS)
    bottom = HEAD + ROW * len(rows)
    body = [*_axis(low, high, scale, bottom, lower_is_better)]
    for place, row in enumerate(rows):
        body += _row(row, scale, HEAD + ROW * (place + 0.5), digits)
    svg = Markup('<svg class="forest" viewBox="0 0 {:.0f} {:.0f}" aria-hidden="true">{}</svg>').format(
        WIDTH, bottom + FOOT, Markup().join(body)
    )
    present = {row.effect for row in rows}
    legend = [LegendEntry(words, effect, "") for effect, words in EFFECTS.items() if effect in present]
    said = "; ".join(f"{row.name} {_number(row, digits)}" for row in rows)
    return Chart(svg, legend, [], f"{what}, difference with 95 % interval: {said}.")


def _axis(low: float, high: float, scale: Scale, bottom: float, lower_is_better: bool) -> list[Markup]:
    marks = ticks(low, high, 4)
    write = mark_writer(marks)
    body = []
    for mark in marks:
        x = scale(mark)
        kind = "zero" if mark == 0 else "grid"
        line = Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{:.1f}"/>')
        body += [line.format(kind, x, x, HEAD, bottom), label(x, bottom + 16, write(mark), "middle")]
    left, right = ("← better", "worse →") if lower_is_better else ("← worse", "better →")
    zero = scale(0.0)
    # A side that has no room has no label.
    sides = [(zero - 8, left, "end", zero - NAMES), (zero + 8, right, "start", RIGHT - NUMBERS - zero)]
    return body + [label(x, bottom + 34, words, anchor) for x, words, anchor, room in sides if room > 56]


def _row(row: Difference, scale: Scale, y: float, digits: int) -> list[Markup]:
    name = row.name if len(row.name) <= LONGEST_NAME else row.name[: LONGEST_NAME - 1] + "…"
    text = Markup('<text class="name" x="{:.1f}" y="{:.1f}" text-anchor="end">{}</text>').format(
        NAMES - 10, y + 4, name
    )
    numbers = label(RIGHT, y + 4, signed_text(row.mean, digits), "end")
    x = scale(row.mean)
    outside = row.mean < scale.low or row.mean > scale.high
    if outside:
        tip = 8 if row.mean > scale.high else -8
        arrow = Markup('<path class="edge {}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}L{:.1f} {:.1f}Z"/>')
        return [text, numbers, arrow.format(row.effect, x - tip, y - 5, x, y, x - tip, y + 5)]
    body = [text, numbers]
    if row.low is not None and row.high is not None:
        line = Markup('<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
        body.append(line.format(row.effect, scale(row.low), scale(row.high), y, y))
    square = Markup('<rect class="square {}{}" x="{:.1f}" y="{:.1f}" width="8" height="8"/>')
    body.append(square.format(row.effect, " bound" if row.is_bound else "", x - 4, y - 4))
    return body


def _number(row: Difference, digits: int) -> str:
    if row.low is None:
        return signed_text(row.mean, digits)
    return f"{signed_text(row.mean, digits)} ({signed_text(row.low, digits)} to {signed_text(row.high, digits)})"
