"""Draws the spectra and the energy of an adapter, by kind of module and by layer."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from flexlora.adapters.inspection import Inspection, ModuleSpectrum, mean_spectrum
from flexlora.files import making_parents, write_whole
from flexlora.text import count_text, number_text, percent_text

MOST_KINDS = 24
"""Kinds of modules drawn; where there are more, those with the most energy."""


ROW_INCHES = 0.26


LOWEST = 1e-6
"""Singular values below this share of the largest lie on the lower edge."""


_INK, _SOFT, _GRID, _NOTHING = "#1d2129", "#575e6b", "#e4e0d8", "#f1f1f1"


_COLOURS = ("#0072b2", "#c24e00", "#00785a", "#9b4a86", "#8a6a00", "#c4485f", "#223d82", "#6b6f78")


_DASHES = ("-", "--", ":")


_HEAT = LinearSegmentedColormap.from_list("energy", ["#fbf3f6", "#d9809f", "#8a1c4a", "#3b0a20"])


_MOST_LETTERS = 30


_WITHOUT_DATE: Mapping[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


_STYLE: dict[Any, Any] = {
    # Text stays text, and equal adapters give equal bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "flexlora",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _SOFT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
}


def write_picture(found: Inspection, path: Path) -> None:
    """Draw an adapter into a file that appears whole or not at all; its ending says the format.

    Args:
        found: With at least one module.
        path: Ends in one of ``PICTURE_ENDINGS``; a file of that name is replaced.
    """
    # Not into the file: where the disk is full, matplotlib fails to close a PDF and hides why.
    drawn = BytesIO()
    with matplotlib.rc_context(_STYLE):
        drawing_of(found).savefig(drawn, format=path.suffix[1:], dpi=160, metadata=_WITHOUT_DATE.get(path.suffix))
    with making_parents(path):
        write_whole(path, drawn.getvalue())


def drawing_of(found: Inspection) -> Figure:
    """Return the spectra and the energy of every kind of module and, where there are layers, the energy by layer."""
    by_energy = sorted(found.kinds, key=lambda kind: -found.share(found.kinds[kind]))
    kinds = {kind: modules for kind, modules in found.kinds.items() if kind in by_energy[:MOST_KINDS]}
    in_layers = [kind for kind, modules in kinds.items() if any(module.layer is not None for module in modules)]
    heights = [max(2.6, ROW_INCHES * len(kinds)), ROW_INCHES * len(in_layers) + 1.1][: 2 if in_layers else 1]
    figure = Figure(figsize=(11, 1.5 + sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08))
    title = f"{_brief(Path(found.folder).name, 60)}\n{_facts(found, len(kinds))}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11)
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    cells = rows[0].subgridspec(1, 3, width_ratios=[5, 2, 2])
    _draw_spectra(figure.add_subplot(cells[0]), list(kinds.values()))
    _draw_energy(figure.add_subplot(cells[1]), kinds, found)
    _draw_ranks(figure.add_subplot(cells[2]), list(kinds.values()))
    if in_layers:
        _draw_layers(figure.add_subplot(rows[1]), {kind: kinds[kind] for kind in in_layers}, found)
    return figure


def _facts(found: Inspection, num_drawn: int) -> str:
    facts = [count_text(len(found.modules), "module"), f"norm of the change {found.energy**0.5:.4g}"]
    if found.base_model:
        facts.insert(0, f"for {_brief(found.base_model, 60)}")
    if num_drawn < len(found.kinds):
        facts.append(f"the {num_drawn} of {len(found.kinds)} kinds of modules with the most energy")
    return ", ".join(facts)


def _draw_spectra(axes: Axes, kinds: Sequence[Sequence[ModuleSpectrum]]) -> None:
    axes.set_title("Singular values over the largest, mean over modules")
    spectra = [mean_spectrum(modules) for modules in kinds]
    for place, spectrum in enumerate(spectra):
        values = [max(value, LOWEST) for value in spectrum]
        dashes = _DASHES[place // len(_COLOURS) % len(_DASHES)]
        # A spectrum of one direction is a point, which a line does not show.
        marker = "o" if len(values) == 1 else ""
        axes.plot(range(1, len(values) + 1), values, dashes, color=_colour(place), linewidth=1.6, marker=marker)
    smallest = min((value for spectrum in spectra for value in spectrum if value > LOWEST), default=1.0)
    longest = max(2, *(len(spectrum) for spectrum in spectra)) if spectra else 2
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(10.0 ** min(-1, floor(log10(smallest))), 1.25)
    axes.set_xlim(1 - 0.02 * longest, 1.02 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("direction")
    axes.grid(True)


def _draw_energy(axes: Axes, kinds: Mapping[str, Sequence[ModuleSpectrum]], found: Inspection) -> None:
    axes.set_title("Share of the energy")
    shares = [found.share(modules) for modules in kinds.values()]
    for place, share in enumerate(shares):
        axes.barh(place, share, height=0.62, color=_colour(place), hatch=_hatch(place), edgecolor="white", linewidth=0)
        _write_behind(axes, share, place, percent_text(share))
    _label_rows(axes, [f"{_brief(kind)}  ({len(modules)})" for kind, modules in kinds.items()])
    axes.set_xlim(0, 1.3 * max(shares) or 1.0)


def _draw_ranks(axes: Axes, kinds: Sequence[Sequence[ModuleSpectrum]]) -> None:
    axes.set_title("Effective rank")
    for place, modules in enumerate(kinds):
        effective = [module.effective_rank for module in modules]
        mean = sum(effective) / len(effective)
        stored = max(module.rank for module in modules)
        axes.barh(place, stored, height=0.62, color=_GRID)
        axes.plot([min(effective), max(effective)], [place, place], color=_colour(place), linewidth=2)
        axes.plot(mean, place, "o", color=_colour(place), markersize=5)
        _write_behind(axes, stored, place, f"{number_text(mean)} of {stored}")
    _label_rows(axes, [""] * len(kinds))
    axes.set_xlim(0, 1.45 * max(module.rank for modules in kinds for module in modules))


def _draw_layers(axes: Axes, kinds: Mapping[str, Sequence[ModuleSpectrum]], found: Inspection) -> None:
    layers = list(found.layers)
    shares = np.full((len(kinds), len(layers)), np.nan)
    for row, modules in enumerate(kinds.values()):
        for column, layer in enumerate(layers):
            here = [module for module in modules if module.layer == layer]
            shares[row, column] = found.share(here) if here else np.nan
    axes.set_title("Share of the energy, by layer")
    axes.set_facecolor(_NOTHING)
    darkest = float(np.nanmax(shares)) or 1.0
    image = axes.imshow(shares, cmap=_HEAT, vmin=0, vmax=darkest, aspect="auto", interpolation="nearest")
    _label_rows(axes, [_brief(kind) for kind in kinds], least=1)
    every = ceil(len(layers) / 40)
    axes.set_xticks(range(0, len(layers), every), labels=[str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer")
    # Gaps between the cells, drawn as a grid in the colour of the page.
    axes.set_xticks([place - 0.5 for place in range(1, len(layers))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, len(kinds))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12, format=PercentFormatter(1.0))
    bar.ax.spines[:].set_visible(False)


def _label_rows(axes: Axes, labels: Sequence[str], least: int = 6) -> None:
    """Label rows from the top down, with room for at least ``least``."""
    axes.set_yticks(range(len(labels)), labels=labels)
    axes.set_ylim(max(least, len(labels)) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _write_behind(axes: Axes, x: float, y: float, text: str) -> None:
    """Write what a bar says at its end; the horizontal axis is then not needed."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", color=_SOFT, size=8)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _hatch(place: int) -> str:
    return ("", "////", "....")[place // len(_COLOURS) % 3]


def _brief(name: str, most: int = _MOST_LETTERS) -> str:
    """Return the end of a name that is too long to show."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
