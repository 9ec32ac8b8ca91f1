"""Draws singular values as a curve, and shares by module and round as a heat map."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from flexlora.report.drawing import BOTTOM, LEFT, RIGHT, TOP, Chart, label, path_through, whole_drawing, x_axis, y_axis
from flexlora.report.scales import Scale, index_ticks, log_ticks, power_of_ten_text
from flexlora.report.scores import finite

HEAT_LEVELS = 10


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
        *y_axis(log_ticks(low, high), y_scale, power_of_ten_text),
        *x_axis(index_ticks(num_values), x_scale),
        Markup('<g class="ranks"></g>'),
    ]
    for style, values in curves:
        path = path_through([(x_scale(k), y_scale(value)) for k, value in enumerate(values, start=1) if finite(value)])
        body.append(Markup('<path class="curve {}" d="{}"/>').format(style, path))
    return whole_drawing(body)


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
    for row, name in enumerate(rows):
        cells = [
            Markup('<rect class="{}" x="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                heat_class(share, top), left + column * width, max(width - 0.8, 0.6), height - 0.8
            )
            for column, share in enumerate(shares[row])
        ]
        if row % label_every == 0:
            cells.append(label(left - 6, height - 4, name, "end"))
        body.append(Markup('<g transform="translate(0 {:.1f})">{}</g>').format(row * height, Markup().join(cells)))
    bottom = len(rows) * height
    every = max(1, math.ceil(len(columns) / 12))
    for column in range(0, len(columns), every):
        body.append(label(left + (column + 0.5) * width, bottom + 15, str(columns[column]), "middle"))
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
