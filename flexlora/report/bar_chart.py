"""Draws columns of stacked bars."""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from flexlora.report.drawing import BOTTOM, LEFT, RIGHT, TOP, Chart, LegendEntry, Reading, label, whole_drawing, y_axis
from flexlora.report.scales import NumberText, Scale, axis_range, ticks


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
    _, y_high = axis_range(0.0, max(totals) / unit, True)
    y_scale = Scale(0.0, y_high, BOTTOM, TOP)
    pitch = (RIGHT - LEFT) / len(columns)
    width = min(0.76 * pitch, 56.0)
    body = y_axis(ticks(0.0, y_high), y_scale)
    every = max(1, math.ceil(len(columns) / 12))
    readings = []
    for index, (number, parts) in enumerate(columns):
        middle = LEFT + (index + 0.5) * pitch
        present = [(style, name, parts[name]) for name, style in styles.items() if parts.get(name, 0.0) > 0]
        if index % every == 0:
            body.append(label(middle, BOTTOM + 20, str(number), "middle"))
        below = 0.0
        for style, _, size in present:
            top, bottom = y_scale((below + size) / unit), y_scale(below / unit)
            below += size
            body.append(_bar(style, middle - width / 2, width, top, bottom))
        lines = [(style, name, write(size)) for style, name, size in reversed(present)]
        readings.append(Reading(round(middle, 1), heading.format(number), lines))
    whole = {name: sum(parts.get(name, 0.0) for _, parts in columns) for name in styles}
    legend = [
        LegendEntry(name, style, write(whole[name]) if with_sums else "")
        for name, style in styles.items()
        if whole[name] > 0
    ]
    sums = "; ".join(f"{name} {write(size)}" for name, size in whole.items() if size > 0)
    return Chart(whole_drawing(body), legend, readings, f"{what}, {len(columns)} bars; in sum: {sums}.")


def _bar(style: str, left: float, width: float, top: float, bottom: float) -> Markup:
    return Markup('<rect class="bar {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        style, left, top, width, max(bottom - top, 0.5)
    )
