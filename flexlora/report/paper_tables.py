"""Tells the rows of a comparison in the shape of the paper's tables and figures (arXiv:2402.11505, Tables 2-4, Fig. 4).

The paper scores ROUGE-L of generated answers, each method with and without FlexLoRA; costs are rounds to a target loss
times the bytes of a round.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flexlora.report.markdown_table import markdown_table
from flexlora.report.measures import MEASURES, curve_of, scores, went_wrong
from flexlora.report.pair_statistics import PairStatistics, holm, pair_statistics
from flexlora.report.paired import Summary
from flexlora.report.study_details import cost_rows
from flexlora.report.study_rows import Row, number
from flexlora.report.study_words import interval_text, p_text
from flexlora.report.verdicts import differences
from flexlora.text import NONE, number_text, signed_text

PAIRS = (
    ("fedavg", "fedavg_flexlora"),
    ("fedit_smallest", "flexlora"),
    ("slora", "slora_flexlora"),
    ("fedit_smallest", "aligned"),
)
"""A method at the smallest rank, and the same at mixed ranks: the rows of the paper's Table 2, and our own method."""

SHOWN = ("flexlora", "aligned")
"""Arms whose categories are compared with the reference."""

SHARE_OF_PROGRESS = 0.95
"""How far on the reference's way the target of the rounds lies: on this base, the first rounds are most of the way."""

ROUGE_L = next(measure for measure in MEASURES if measure.key == "rouge_l")


@dataclass(frozen=True)
class Improvement:
    """What mixed ranks add to a method on one distribution, by ROUGE-L on unseen tasks, paired by draw."""

    distribution: str
    plain: str
    mixed: str
    plain_mean: float
    mixed_mean: float
    pairs: PairStatistics
    p_holm: float | None

    @property
    def percent(self) -> float | None:
        """The improvement relative to the plain method; None where that has no score above zero."""
        return 100 * (self.mixed_mean / self.plain_mean - 1) if self.plain_mean > 0 else None


@dataclass(frozen=True)
class RoundsToTarget:
    """How many rounds an arm took to a loss, and what they cost.

    Attributes:
        rounds: Median over the draws, between evaluations by a straight line; None unless more than half got there.
        num_reached: Draws that got there.
        cost: Bytes of a round, to those of the reference; 0 where no factors travel.
    """

    arm: str
    rounds: float | None
    num_reached: int
    num_draws: int
    cost: float | None


def paper_part(summary: Summary) -> list[str]:
    """Return the lines of the tables that the rows can fill; see the module."""
    lines: list[str] = []
    for table in (_improvement_lines, _category_lines, _target_lines):
        found = list(table(summary))
        lines += [*([""] if lines and found else []), *found]
    return lines or ["No study has the methods of the paper's tables."]


def improvements(summary: Summary) -> list[Improvement]:
    """Return what mixed ranks add to each method of `PAIRS` on each distribution; p corrected over all of them.

    A run that diverged counts as the worst of its draw, as everywhere.
    """
    found: list[Improvement] = []
    values = scores(summary.runs, ROUGE_L)
    for plain, mixed in PAIRS:
        for where in summary.distributions:
            own, other = (values.get((where, arm), {}) for arm in (plain, mixed))
            if draws := sorted(own.keys() & other.keys()):
                before, after = (statistics.fmean(one[draw] for draw in draws) for one in (own, other))
                pairs = pair_statistics(differences(other, own))
                found.append(Improvement(where, plain, mixed, before, after, pairs, None))
    corrected = iter(holm([p for one in found if (p := one.pairs.p) is not None]))
    return [one if one.pairs.p is None else replace(one, p_holm=next(corrected)) for one in found]


def category_scores(summary: Summary, where: str, arm: str) -> dict[str, float]:
    """Return category of unseen tasks -> mean ROUGE-L of an arm over its draws, without runs that went wrong."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for run in _runs(summary, where, arm):
        categories = run.get("categories")
        for name, score in categories.items() if isinstance(categories, dict) else ():
            value = number(score.get(ROUGE_L.key)) if isinstance(score, dict) else None
            if value is not None:
                values[name].append(value)
    return {name: statistics.fmean(found) for name, found in sorted(values.items())}


def rounds_to_target(summary: Summary, where: str) -> list[RoundsToTarget]:
    """Return the rounds that each trained arm takes to the target of its draw; see `target_of`."""
    found = {run["draw"]: target_of(run) for run in _runs(summary, where, summary.reference)}
    targets = {draw: target for draw, target in found.items() if target is not None}
    rows = []
    for cost in cost_rows(summary, where):
        runs = [run for run in _runs(summary, where, cost.arm) if run["rounds"] and run["draw"] in targets]
        reached = [_first_round(run, targets[run["draw"]]) for run in runs]
        known = sorted(value for value in reached if value is not None)
        if not runs or not curve_of(runs[0], "unseen_loss"):
            continue
        # Draws that never get there are later than all others: the median is theirs if they are the half.
        middle = statistics.median([*known, *[float("inf")] * (len(reached) - len(known))])
        rounds = middle if middle < float("inf") else None
        rows.append(RoundsToTarget(cost.arm, rounds, len(known), len(reached), cost.bytes_ratio))
    return rows


def target_of(run: Row) -> float | None:
    """Return the loss after `SHARE_OF_PROGRESS` of the way of a run from the base to its own lowest loss."""
    losses = dict(curve_of(run, "unseen_loss"))
    if 0.0 not in losses:
        return None
    return losses[0.0] - SHARE_OF_PROGRESS * (losses[0.0] - min(losses.values()))


def _first_round(run: Row, target: float) -> float | None:
    """Return the round at which the curve of a run first comes down to a loss; None if it never does."""
    before: tuple[float, float] | None = None
    for at, loss in sorted(curve_of(run, "unseen_loss")):
        if loss <= target:
            if before is None:
                return at
            return before[0] + (at - before[0]) * (before[1] - target) / (before[1] - loss)
        before = at, loss
    return None


def _improvement_lines(summary: Summary) -> Iterator[str]:
    found = improvements(summary)
    if not found:
        return
    yield (
        "**Tables 2, 3 and 11: ROUGE-L of generated answers on unseen tasks (0 to 100), each method at the smallest "
        "rank and with FlexLoRA at mixed ranks, and ours.** Differences are paired by draw, p is a t-test, "
        f"Holm-corrected over the {len(found)} lines."
    )
    yield ""
    rows = [
        (
            one.mixed,
            one.distribution,
            number_text(one.plain_mean, 2),
            number_text(one.mixed_mean, 2),
            signed_text(one.pairs.mean, 2),
            interval_text(one.pairs, 2),
            signed_text(one.percent, 1, " %"),
            p_text(one.p_holm),
        )
        for one in found
    ]
    columns = (
        "arm",
        "distribution",
        "smallest rank",
        "mixed ranks",
        "difference",
        "95 % interval",
        "improvement",
        "p (Holm)",
    )
    yield from markdown_table(columns, rows)


def _category_lines(summary: Summary) -> Iterator[str]:
    scores = {
        (where, arm): category_scores(summary, where, arm)
        for where in summary.distributions
        for arm in ("base", summary.reference, *SHOWN)
    }
    names = sorted({name for values in scores.values() for name in values})
    if not names:
        return
    yield (
        f"**Figure 4: ROUGE-L by category of unseen tasks,** means over draws; difference to `{summary.reference}`. "
        "A category has a few tasks, so a single line says little; counts of lines say more."
    )
    yield ""
    wheres = summary.distributions
    counted = [
        (arm, *(_counted(scores[where, arm], scores[where, summary.reference]) for where in wheres)) for arm in SHOWN
    ]
    yield from markdown_table(("categories ahead, equal, behind", *wheres), counted)
    yield from ("", f"<details><summary>All {len(names)} categories</summary>", "")
    columns = ["category", "base", summary.reference, *(f"{arm}, {where}" for where in wheres for arm in SHOWN)]
    first = wheres[0]
    rows = []
    for name in names:
        plain = [number_text(scores[first, arm].get(name), 1) for arm in ("base", summary.reference)]
        gains = [_gain(scores[where, arm], scores[where, summary.reference], name) for where in wheres for arm in SHOWN]
        rows.append((name, *plain, *gains))
    yield from markdown_table(columns, rows)
    yield from ("", "</details>")


def _target_lines(summary: Summary) -> Iterator[str]:
    tables = {where: rounds_to_target(summary, where) for where in summary.distributions}
    tables = {where: rows for where, rows in tables.items() if rows}
    if not tables:
        return
    yield (
        "**Table 4: rounds to a target, relative cost of a round, and their product.** The target is the loss after "
        f"{100 * SHARE_OF_PROGRESS:.0f} % of the way of `{summary.reference}`, draw by draw; cost is bytes both ways. "
        "Medians over draws, between evaluations by a straight line; in brackets how many draws got there, if not all."
    )
    yield ""
    arms = sorted({row.arm for rows in tables.values() for row in rows}, key=lambda arm: _place(tables, arm))
    rows = [(arm, *(_target_cell(rows, arm) for rows in tables.values())) for arm in arms]
    yield from markdown_table(("rounds × cost = total", *tables), rows)


def _target_cell(rows: Sequence[RoundsToTarget], arm: str) -> str:
    one = next((row for row in rows if row.arm == arm), None)
    if one is None:
        return NONE
    reached = "" if one.num_reached == one.num_draws else f" ({one.num_reached} of {one.num_draws})"
    if one.rounds is None:
        return f"never{reached}"
    if not one.cost:
        return f"{one.rounds:.1f}{reached}"
    return f"{one.rounds:.1f} × {one.cost:.2f} = {one.rounds * one.cost:.0f}{reached}"


def _place(tables: Mapping[str, Sequence[RoundsToTarget]], arm: str) -> tuple[float, str]:
    cells = [row for rows in tables.values() for row in rows if row.arm == arm]
    totals = [float("inf") if row.rounds is None else row.rounds * (row.cost or 0.0) for row in cells]
    return statistics.median(totals), arm


def _counted(own: Mapping[str, float], reference: Mapping[str, float]) -> str:
    gains = [own[name] - reference[name] for name in own.keys() & reference.keys()]
    numbers = (sum(gain > 0 for gain in gains), gains.count(0.0), sum(gain < 0 for gain in gains))
    return ", ".join(map(str, numbers)) if gains else NONE


def _gain(own: Mapping[str, float], reference: Mapping[str, float], name: str) -> str:
    return signed_text(own[name] - reference[name], 1) if name in own and name in reference else NONE


def _runs(summary: Summary, where: str, arm: str) -> list[Row]:
    return [run for run in summary.runs if (run["distribution"], run["arm"]) == (where, arm) and not went_wrong(run)]
