"""Computes the cells of the main table of a comparison, written out, for page, terminal and Markdown alike."""

from dataclasses import dataclass

from flexlora.report.measures import Measure
from flexlora.report.pair_statistics import ALPHA
from flexlora.report.paired import Cell, Summary
from flexlora.report.study_words import draws_text, interval_text, p_text, spread_text
from flexlora.report.verdicts import OUT_OF_REACH, Verdict
from flexlora.text import NONE, number_text, percent_text, signed_text

MAIN_COLUMNS = ("arm", "draws", "mean ± s.d.", "difference", "95 % interval", "p (Holm)", "flips", "power", "needs")
"""Difference, interval and p are to the reference; flips is the chance that three new draws disagree on the sign."""


@dataclass(frozen=True)
class MainRow:
    """One arm in the main table.

    Attributes:
        place: ``first``, ``tied`` or ``behind`` for a contender, ``bound`` for what no client could run, ``unranked``
            for too few draws, ``early`` as long as all have one.
        effect: ``better``, ``worse`` or ``open``, compared with the reference; None for the reference itself.
        cells: Under `MAIN_COLUMNS`.
    """

    cell: Cell
    place: str
    effect: str | None
    cells: tuple[str, ...]


def main_rows(summary: Summary, measure: Measure, distribution: str) -> list[MainRow]:
    """Return the main table of one distribution, best mean first."""
    verdict = summary.verdicts.get((measure.key, distribution))
    return [
        MainRow(cell, _place(cell.arm, verdict), _effect(cell, measure), _texts(cell, measure))
        for cell in summary.ranked(measure.key, distribution)
    ]


def _place(arm: str, verdict: Verdict | None) -> str:
    if arm in OUT_OF_REACH:
        return "bound"
    if verdict is None or arm in verdict.left_out:
        return "unranked"
    if verdict.is_early:
        return "early"
    if arm == verdict.first:
        return "first" if verdict.winner else "tied"
    return "tied" if arm in verdict.tied else "behind"


def _effect(cell: Cell, measure: Measure) -> str | None:
    if cell.pairs is None:
        return None
    if cell.p_holm is None or cell.p_holm >= ALPHA:
        return "open"
    return "better" if (cell.pairs.mean < 0) == measure.lower_is_better else "worse"


def _texts(cell: Cell, measure: Measure) -> tuple[str, ...]:
    pairs = cell.pairs
    flips = None
    if pairs is not None:
        flips = pairs.flip_observed if pairs.flip_observed is not None else pairs.flip_predicted
    return (
        cell.arm + (" †" if cell.num_diverged else ""),
        number_text(cell.num_draws, 0),
        spread_text(cell, measure.digits),
        signed_text(pairs.mean, measure.digits) if pairs else NONE,
        interval_text(pairs, measure.digits),
        p_text(cell.p_holm) + ("*" if pairs and pairs.test == "wilcoxon" else ""),
        percent_text(flips, 0),
        percent_text(pairs.power, 0) if pairs else NONE,
        draws_text(pairs),
    )
