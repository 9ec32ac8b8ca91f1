"""Turns the rows of a comparison into means, paired differences, verdicts, costs and flags."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import stdev
from typing import Any

from flexlora.report.chosen_rates import ChosenRate, chosen_rates
from flexlora.report.counted_runs import counted_runs
from flexlora.report.measures import MEASURES, Measure, Scores, scores, went_wrong
from flexlora.report.pair_statistics import PairStatistics, holm, pair_statistics
from flexlora.report.run_costs import Costs, typical_costs
from flexlora.report.study_flags import Flag, study_flags
from flexlora.report.study_rows import DEFAULT_REFERENCE, ROWS_FILE, Row, StudyError, read_rows
from flexlora.report.verdicts import Verdict, differences, verdicts

__all__ = [
    "DEFAULT_REFERENCE",
    "ROWS_FILE",
    "Cell",
    "ChosenRate",
    "Row",
    "StudyError",
    "Summary",
    "chosen_rates",
    "read_rows",
    "summary",
]


@dataclass(frozen=True)
class Cell:
    """One arm on one distribution by one measure.

    Attributes:
        mean: Over the draws of the arm, a run that went wrong at the worst value of its draw.
        sd: Over draws; None below two.
        pairs: Arm minus reference; None for the reference itself, or without a draw that both have.
        p_holm: The p of the pairs, corrected over all arms and distributions of this measure.
        notes: What to know before reading the numbers.
    """

    arm: str
    distribution: str
    measure: str
    num_draws: int
    num_diverged: int
    mean: float
    sd: float | None
    pairs: PairStatistics | None
    p_holm: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What a comparison shows.

    Attributes:
        reference: The arm that differences are to.
        arms: In the order of the rows.
        distributions: In the order of the rows.
        measures: Those that some run has, the headline first.
        cells: (measure, distribution, arm) -> its numbers.
        verdicts: (measure, distribution) -> who is first.
        rates: (arm, distribution) -> the learning rate that was chosen.
        costs: (distribution, arm) -> cost of a run.
        runs: The test rows that count, at the learning rates chosen.
    """

    reference: str
    arms: tuple[str, ...]
    distributions: tuple[str, ...]
    measures: tuple[Measure, ...]
    cells: Mapping[tuple[str, str, str], Cell]
    verdicts: Mapping[tuple[str, str], Verdict]
    rates: Mapping[tuple[str, str], ChosenRate]
    costs: Mapping[tuple[str, str], Costs]
    flags: tuple[Flag, ...]
    runs: tuple[Row, ...]

    @property
    def headline(self) -> Measure | None:
        """The measure that decides; None before any test run has a score."""
        return self.measures[0] if self.measures else None

    def ranked(self, measure: str, distribution: str) -> list[Cell]:
        """Return the cells of a table, best mean first."""
        lower = next((one.lower_is_better for one in self.measures if one.key == measure), True)
        found = [self.cells[key] for arm in self.arms if (key := (measure, distribution, arm)) in self.cells]
        return sorted(found, key=lambda cell: cell.mean if lower else -cell.mean)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as plain JSON without NaN; what is not known is null."""
        return {
            "reference": self.reference,
            "arms": list(self.arms),
            "distributions": list(self.distributions),
            "measures": [
                {"key": m.key, "title": m.title, "unit": m.unit, "lower_is_better": m.lower_is_better}
                for m in self.measures
            ],
            "cells": [asdict(cell) for cell in self.cells.values()],
            "verdicts": [
                {**asdict(verdict), "winner": verdict.winner, "tied": list(verdict.tied)}
                for verdict in self.verdicts.values()
            ],
            "rates": [{**asdict(rate), "edge": rate.edge} for rate in self.rates.values()],
            "costs": [{"distribution": where, "arm": arm, **asdict(c)} for (where, arm), c in self.costs.items()],
            "flags": [asdict(flag) for flag in self.flags],
        }


def summary(rows: Iterable[Row], reference: str = DEFAULT_REFERENCE) -> Summary:
    """Return what the rows of a comparison show; works at any time, also before the first test run.

    Args:
        rows: Of both phases, any order.
        reference: The arm that differences are to; where it has no runs, there are none.
    """
    rows = list(rows)
    rates = chosen_rates(rows)
    runs = counted_runs(rows, rates)
    arms = tuple(dict.fromkeys(row["arm"] for row in [*runs, *rows]))
    distributions = tuple(dict.fromkeys(row["distribution"] for row in [*runs, *rows]))
    cells: dict[tuple[str, str, str], Cell] = {}
    found_verdicts: dict[tuple[str, str], Verdict] = {}
    measures = []
    wrong = {(row["distribution"], row["arm"]) for row in runs if went_wrong(row)}
    for measure in MEASURES:
        values = scores(runs, measure)
        if not any(measure.value(row) is not None for row in runs):
            continue
        measures.append(measure)
        for cell in _cells(values, measure, runs, reference):
            cells[measure.key, cell.distribution, cell.arm] = cell
        for where, verdict in verdicts(values, measure, reference, wrong).items():
            found_verdicts[measure.key, where] = verdict
    return Summary(
        reference=reference,
        arms=arms,
        distributions=distributions,
        measures=tuple(measures),
        cells=cells,
        verdicts=found_verdicts,
        rates=rates,
        costs=typical_costs(runs),
        flags=tuple(study_flags(rows, runs, rates, reference)),
        runs=tuple(runs),
    )


def _cells(values: Scores, measure: Measure, runs: Sequence[Row], reference: str) -> list[Cell]:
    wrong = [(row["distribution"], row["arm"]) for row in runs if went_wrong(row)]
    cells = []
    for (where, arm), by_draw in values.items():
        others = values.get((where, reference), {})
        shared = [] if arm == reference else differences(by_draw, others)
        pairs = pair_statistics(shared) if shared else None
        numbers = list(by_draw.values())
        cell = Cell(
            arm=arm,
            distribution=where,
            measure=measure.key,
            num_draws=len(numbers),
            num_diverged=wrong.count((where, arm)),
            mean=math.fsum(numbers) / len(numbers),
            sd=stdev(numbers) if len(numbers) > 1 else None,
            pairs=pairs,
            p_holm=None,
            notes=(),
        )
        cells.append(replace(cell, notes=tuple(_notes(cell, len(others), reference))))
    tested = [(cell, p) for cell in cells if cell.pairs is not None and (p := cell.pairs.p) is not None]
    corrected = holm([p for _, p in tested])
    by_cell = {(cell.distribution, cell.arm): p for (cell, _), p in zip(tested, corrected, strict=True)}
    return [replace(cell, p_holm=by_cell.get((cell.distribution, cell.arm))) for cell in cells]


def _notes(cell: Cell, num_reference: int, reference: str) -> Iterable[str]:
    """Yield what to know before reading the numbers of a cell."""
    if cell.num_diverged:
        yield f"{cell.num_diverged} of {cell.num_draws} runs diverged or failed and count as the worst of their draw"
    if cell.arm == reference:
        return
    if cell.pairs is None:
        yield f"no draw in common with {reference}"
        return
    if cell.pairs.num_pairs < max(num_reference, cell.num_draws):
        yield f"only {cell.pairs.num_pairs} draws in common with {reference}"
    if cell.pairs.num_pairs == 1:
        yield "one draw: no interval, no test"
    elif cell.pairs.is_constant and cell.pairs.mean == 0:
        yield f"equal to {reference} in every draw"
    elif cell.pairs.is_constant:
        yield "the same difference in every draw: no t-test, only the signs count"
    elif cell.pairs.num_pairs == 2:
        yield "two draws: the interval rests on one degree of freedom"
