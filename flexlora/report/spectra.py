"""Numbers of an adapter -> one SVG file that needs nothing else: its spectra, and where its energy sits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from markupsafe import Markup

from flexlora.report import figures
from flexlora.report.tables import percent_text, short_names

STYLES = ("c1", "c2", "c3", "c4", "c5", "c6", "p1", "p2", "p3", "p4", "p5")
LOWEST = 1e-6
"""Singular values below this share of the largest lie on the lower edge."""

_LINE, _MARGIN, _LEGEND_COLUMNS = 18.0, 20.0, 3
_COLOURS = {
    "page": ("#ffffff", "#12151a"),
    "ink": ("#1d2129", "#e9e7e1"),
    "soft": ("#575e6b", "#a6acb8"),
    "grid": ("#ebe8e1", "#272c35"),
    "heat": ("#8a1c4a", "#ff7fae"),
    "c1": ("#0072b2", "#58b4f0"),
    "c2": ("#c24e00", "#ff9a57"),
    "c3": ("#00785a", "#3fcf9f"),
    "c4": ("#9b4a86", "#e08fc9"),
    "c5": ("#8a6a00", "#e3c14b"),
    "c6": ("#6b6f78", "#a3a8b3"),
    "p1": ("#b87a00", "#ffd27a"),
    "p2": ("#c4485f", "#f58b97"),
    "p3": ("#7a4ba3", "#bc9bec"),
    "p4": ("#223d82", "#6f9bff"),
    "p5": ("#1f7a6d", "#5fd1c0"),
}


@dataclass(frozen=True)
class KindOfModule:
    """Modules that do the same in every layer.

    Attributes:
        name: Path within a layer.
        share: Of the energy of the adapter, 0..1.
        spectrum: Singular values over the largest, averaged over the modules.
        share_by_layer: Share of the energy in each layer drawn; None where a layer has no such module.
    """

    name: str
    share: float
    spectrum: Sequence[float]
    share_by_layer: Sequence[float | None]


def draw_adapter(title: str, subtitle: str, kinds: Sequence[KindOfModule], layers: Sequence[int]) -> str:
    """Return the text of an SVG file.

    Args:
        title: First line.
        subtitle: Second line.
        kinds: At least one.
        layers: Numbers of the layers in ``share_by_layer``; none leaves the map of layers out.
    """
    names = short_names([kind.name for kind in kinds])
    styles = [STYLES[place % len(STYLES)] for place in range(len(kinds))]
    length = max(len(kind.spectrum) for kind in kinds)
    positive = [value for kind in kinds for value in kind.spectrum if value > LOWEST]
    curves = [(style, kind.spectrum) for style, kind in zip(styles, kinds, strict=True)]
    lowest = 10.0 ** min(-1, floor(log10(min(positive, default=0.1))))
    chart = figures.spectrum_chart(lowest, 1.0, length, curves)
    body = [_text(_MARGIN, 30, "title", title), _text(_MARGIN, 50, "soft", subtitle)]
    body.append(_text(_MARGIN, 82, "head", "Singular values over the largest, by direction (mean over layers)"))
    body.append(_placed(chart, 90, figures.HEIGHT))
    top = 90 + figures.HEIGHT + _LINE
    body += _legend(names, [percent_text(kind.share) for kind in kinds], styles, top)
    top += _LINE * -(-len(kinds) // _LEGEND_COLUMNS) + 14
    if layers:
        rows = {
            name: kind.share_by_layer
            for name, kind in zip(names, kinds, strict=True)
            if any(share is not None for share in kind.share_by_layer)
        }
        largest = max(share for row in rows.values() for share in row if share is not None)
        heat = figures.heatmap(list(rows), layers, list(rows.values()), largest).svg
        height = float(re.findall(r'viewBox="0 0 520 (\d+)"', heat)[0])
        body.append(_text(_MARGIN, top, "head", f"Energy by layer, darkest is {percent_text(largest)} of the adapter"))
        body.append(_placed(heat, top + 10, height))
        top += 10 + height
    width, height = figures.WIDTH + 2 * _MARGIN, top + _MARGIN
    drawing = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" '
        'role="img"><title>{2}</title><style>{3}</style><rect class="page" width="100%" height="100%"/>{4}</svg>\n'
    )
    return str(drawing.format(width, height, title, Markup(_style()), Markup().join(body)))


def _placed(drawing: Markup, top: float, height: float) -> Markup:
    return Markup('<svg x="{}" y="{:.0f}" width="{:.0f}" height="{:.0f}">{}</svg>').format(
        _MARGIN, top, figures.WIDTH, height, drawing
    )


def _legend(names: Sequence[str], shares: Sequence[str], styles: Sequence[str], top: float) -> list[Markup]:
    body = []
    for place, (name, share, style) in enumerate(zip(names, shares, styles, strict=True)):
        row, column = divmod(place, _LEGEND_COLUMNS)
        x, y = _MARGIN + column * figures.WIDTH / _LEGEND_COLUMNS, top + row * _LINE
        body.append(
            Markup('<rect class="bar {}" x="{:.0f}" y="{:.0f}" width="14" height="10"/>').format(style, x, y - 9)
        )
        body.append(_text(x + 20, y, "soft", f"{name}  {share}"))
    return body


def _text(x: float, y: float, style: str, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.0f}" y="{:.0f}">{}</text>').format(style, x, y, text)


def _style() -> str:
    light, dark = ("".join(f"--{name}:{pair[scheme]};" for name, pair in _COLOURS.items()) for scheme in (0, 1))
    hues = "".join(f".{style}{{--hue:var(--{style})}}" for style in STYLES)
    levels = "".join(f".heat .h{level}{{fill-opacity:{0.05 + level * 0.105:.2f}}}" for level in range(10))
    return (
        f"svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
        "text{font:12px system-ui,sans-serif;fill:var(--soft)}.title{font-size:18px;fill:var(--ink)}"
        ".head{font-size:13px;fill:var(--ink)}.page{fill:var(--page)}.grid{stroke:var(--grid)}.axis{stroke:var(--soft)}"
        ".curve{fill:none;stroke:var(--hue);stroke-width:2;stroke-linejoin:round}.bar{fill:var(--hue)}"
        ".heat rect{fill:var(--heat)}.heat text{font-size:11px}.heat .none{fill:none;stroke:var(--grid)}"
        + hues
        + levels
    )
