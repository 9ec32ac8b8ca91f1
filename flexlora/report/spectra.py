"""Prepares the singular values of every module and round for a page, with the errors of cutting them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexlora.report import drawing
from flexlora.report.drawing import Chart
from flexlora.report.run_folder import RunFolder
from flexlora.report.spectra_charts import heatmap, spectrum_chart
from flexlora.report.spectra_codes import encode, pack_spectra
from flexlora.rounds.records import RoundRecord, SpectrumRecord
from flexlora.text import layer_order, short_names

MAX_SPECTRA = 2400
"""Spectra in one page; with more, rounds are left out evenly."""


@dataclass(frozen=True)
class SpectraView:
    """The singular values of every module and round, made small enough for a page."""

    modules: Sequence[str]
    rounds: Sequence[int]
    num_rounds_left_out: int
    curve: Chart
    heat: Chart
    heat_top: float
    plans: Sequence[str]
    error_rows: Sequence[tuple[str, Sequence[tuple[int, float | None]]]]
    data: dict[str, object]


def spectra_view(run: RunFolder) -> SpectraView | None:
    """Return the singular values with their truncation errors; None when no round recorded any that is not zero."""
    recorded = [record for record in run.records if record.spectra]
    modules = sorted({module for record in recorded for module in record.spectra}, key=layer_order)
    spectra = [spectrum for record in recorded for spectrum in record.spectra.values()]
    values = [value for spectrum in spectra for value in spectrum.singular_values if value > 0 and math.isfinite(value)]
    if not values:
        return None
    kept = _thin(recorded, max(2, MAX_SPECTRA // len(modules)))
    high = 10.0 ** math.ceil(math.log10(max(values)))
    low = max(10.0 ** math.floor(math.log10(min(values))), high * 1e-8)
    length = max(len(spectrum.singular_values) for spectrum in spectra)
    errors = {plan: _errors(kept, modules, ranks) for plan, ranks in run.plan_ranks.items()}
    present = [error for lines in errors.values() for line in lines for error in line if error is not None]
    top = max(0.1, math.ceil(10 * max(present, default=0.1) - 1e-9) / 10)
    rounds = [record.server_round for record in kept]
    short = short_names(modules)
    smallest = next(iter(errors.values()), [[None] * len(kept)] * len(modules))
    first = kept[-1].spectra.get(modules[0])
    curve = spectrum_chart(low, high, length, [("then", []), ("c1", first.singular_values if first else [])])
    return SpectraView(
        modules=modules,
        rounds=rounds,
        num_rounds_left_out=len(recorded) - len(kept),
        curve=Chart(curve, [], [], f"Singular values of one module on a logarithmic axis from {low:g} to {high:g}"),
        heat=heatmap(short, rounds, smallest, top),
        heat_top=top,
        plans=[run.called(plan) for plan in errors],
        error_rows=[
            (name, [(ranks.get(module, 0), errors[plan][place][-1]) for plan, ranks in run.plan_ranks.items()])
            for place, (name, module) in enumerate(zip(short, modules, strict=True))
        ],
        data={
            "modules": modules,
            "rounds": rounds,
            "plans": _plans(run, modules),
            "low": math.log10(low),
            "high": math.log10(high),
            "length": max(length, 2),
            "box": [drawing.LEFT, drawing.RIGHT, drawing.TOP, drawing.BOTTOM],
            "top": top,
            "errors": [[encode(line, 0.0, 1.0) for line in lines] for lines in errors.values()],
            **pack_spectra([[record.spectra.get(module) for record in kept] for module in modules], low, high),
        },
    )


def truncation_error(spectrum: SpectrumRecord, rank: int) -> float | None:
    """Return the share (0 to 1) of the Frobenius norm that the best approximation of ``rank`` leaves out.

    ``sqrt(sum_{k > rank} sigma_k^2 + tail^2) / sqrt(sum_k sigma_k^2 + tail^2)`` (Eckart-Young); None for a module
    whose change is zero or not finite.
    """
    tail = spectrum.tail * spectrum.tail
    left_out = math.fsum(value * value for value in spectrum.singular_values[rank:]) + tail
    whole = math.fsum(value * value for value in spectrum.singular_values[:rank]) + left_out
    return math.sqrt(left_out / whole) if whole > 0 and math.isfinite(whole) else None


def _errors(
    records: Sequence[RoundRecord], modules: Sequence[str], ranks: Mapping[str, int]
) -> list[list[float | None]]:
    """Return the truncation error per module and round; None where a round has no spectrum of a module."""
    spectra = [[record.spectra.get(module) for record in records] for module in modules]
    return [
        [truncation_error(spectrum, ranks.get(module, 0)) if spectrum else None for spectrum in line]
        for module, line in zip(modules, spectra, strict=True)
    ]


def _plans(run: RunFolder, modules: Sequence[str]) -> list[dict[str, object]]:
    return [
        {
            "name": run.called(plan),
            "style": run.plan_styles[plan],
            "ranks": [ranks.get(module, 0) for module in modules],
        }
        for plan, ranks in run.plan_ranks.items()
    ]


def _thin(records: Sequence[RoundRecord], most: int) -> list[RoundRecord]:
    """Return at most ``most`` of the records, evenly spread, first and last included."""
    if len(records) <= most:
        return list(records)
    return [records[round(place * (len(records) - 1) / (most - 1))] for place in range(most)]
