"""Draws a few values as dots on one small scale, for a cell of a table."""

from collections.abc import Sequence

from markupsafe import Markup

from flexlora.report.scales import Scale


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
