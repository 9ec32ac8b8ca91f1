"""Chooses what the figures of a comparison show: differences, curves over rounds, learning rates."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from flexlora.report.chosen_rates import UNTRAINED, ChosenRate
from flexlora.report.figures import Figure
from flexlora.report.forest_chart import Difference, forest_chart
from flexlora.report.line_chart import Axis, Series, line_chart
from flexlora.report.measures import Measure, curve_of, went_wrong
from flexlora.report.paired import Summary
from flexlora.report.study_tables import main_rows
from flexlora.report.verdicts import OUT_OF_REACH
from flexlora.text import count_text, number_text, signed_text

MAIN_LINES = 5
REFERENCE_STYLE = "c6"
BAND_DRAWS = 4
"""From this many draws on, the band is the middle half of them; below, it is all."""

FAR_ARMS = (UNTRAINED, "alone")
"""Arms so far from the others that they would squeeze them."""

PAPER_METHOD = "flexlora"
NATS = "nats per answer token"
OVER_ROUNDS = (
    "Line: median over draws. Band: the middle half of the draws, or all if they are fewer than four. Runs that "
    "diverged are left out."
)


def forests(summary: Summary, measure: Measure) -> list[Figure]:
    """Return the differences to the reference, one figure a distribution."""
    figures = []
    for place, where in enumerate(summary.distributions):
        rows = [
            Difference(
                name=row.cells[0],
                mean=row.cell.pairs.mean,
                low=row.cell.pairs.low,
                high=row.cell.pairs.high,
                effect=row.effect or "open",
                is_bound=row.place == "bound",
                is_far=row.cell.arm in FAR_ARMS or bool(row.cell.num_diverged),
            )
            for row in main_rows(summary, measure, where)
            if row.cell.pairs is not None
        ]
        rows.sort(key=lambda row: row.mean if measure.lower_is_better else -row.mean)
        chart = forest_chart(
            rows, what=f"{measure.title}, {where}", digits=measure.digits, lower_is_better=measure.lower_is_better
        )
        caption = "Arrows: far outside. Hollow: out of reach of these clients. Lines: 95 % interval of the mean."
        unit = f"{measure.unit}, arm minus {summary.reference}, paired by draw"
        figures.append(Figure(f"forest-{place}", where, unit, caption, chart))
    return figures


def line_arms(summary: Summary) -> list[list[str]]:
    """Return arms in groups that one chart can hold, the most interesting first; the reference is in none.

    The first group has the paper's method, what all clients could reach at the largest rank, and the best contenders.
    """
    measure = summary.headline
    if measure is None:
        return []
    places: defaultdict[str, list[float]] = defaultdict(list)
    for where in summary.distributions:
        order = [cell.arm for cell in summary.ranked(measure.key, where)]
        for place, arm in enumerate(order):
            places[arm].append(place / len(order))
    trained = [arm for arm in places if arm not in (UNTRAINED, summary.reference)]
    best_first = sorted(trained, key=lambda arm: sum(places[arm]) / len(places[arm]))
    fixed = [arm for arm in (PAPER_METHOD, OUT_OF_REACH[0]) if arm in trained]
    contenders = [arm for arm in best_first if arm not in fixed and arm not in OUT_OF_REACH]
    first = [*contenders[: MAIN_LINES - len(fixed)], *fixed]
    others = [arm for arm in best_first if arm not in first]
    return [first, *(others[start : start + MAIN_LINES] for start in range(0, len(others), MAIN_LINES))]


def curves(summary: Summary, arms: Sequence[str], name: str) -> list[tuple[str, list[Figure]]]:
    """Return for each distribution what happened over rounds for some arms and the reference, up to three figures."""
    shown = []
    lines = [(arm, f"c{1 + n}") for n, arm in enumerate(arms)]
    for place, where in enumerate(summary.distributions):
        figures = []
        for key, title in (("unseen_loss", "Loss on unseen tasks"), ("validation_loss", "Validation loss")):
            styled = [*lines, (summary.reference, REFERENCE_STYLE)]
            series = [_series(arm, style, _by_draw(summary, arm, where, key)) for arm, style in styled]
            chart = line_chart(series, what=f"{title}, {where}", from_zero=False, write=_loss)
            figures.append(Figure(f"{name}-{place}-{key[:6]}", title, NATS, OVER_ROUNDS, chart))
        figures.append(_paired_figure(summary, lines, where, f"{name}-{place}-paired"))
        shown.append((where, [figure for figure in figures if figure.chart is not None]))
    return [(where, figures) for where, figures in shown if figures]


def _paired_figure(summary: Summary, lines: Sequence[tuple[str, str]], where: str, key: str) -> Figure:
    reference = _by_draw(summary, summary.reference, where, "validation_loss")
    series = [
        _series(arm, style, _minus(_by_draw(summary, arm, where, "validation_loss"), reference)) for arm, style in lines
    ]
    if any(line.present for line in series):
        series.append(Series(summary.reference, REFERENCE_STYLE, [(0, 0.0)], is_level=True))
    title = f"Validation loss minus {summary.reference}"
    chart = line_chart(series, what=f"{title}, {where}", from_zero=True, write=_difference)
    return Figure(key, title, f"{NATS}, paired by draw", OVER_ROUNDS, chart)


Curves = dict[int, dict[float, float]]
"""Draw -> round -> value."""


def _by_draw(summary: Summary, arm: str, where: str, key: str) -> Curves:
    runs = [r for r in summary.runs if (r["arm"], r["distribution"]) == (arm, where) and not went_wrong(r)]
    return {run["draw"]: dict(curve_of(run, key)) for run in runs}


def _minus(values: Curves, others: Curves) -> Curves:
    return {
        draw: {x: values[draw][x] - others[draw][x] for x in values[draw].keys() & others[draw].keys()}
        for draw in values.keys() & others.keys()
    }


def _series(arm: str, style: str, by_draw: Curves) -> Series:
    at_round: defaultdict[float, list[float]] = defaultdict(list)
    for curve in by_draw.values():
        for x, y in curve.items():
            at_round[x].append(y)
    # Where most runs have ended, the median would jump.
    rounds = sorted(x for x, values in at_round.items() if 2 * len(values) >= len(by_draw))
    low, high = (25, 75) if len(by_draw) >= BAND_DRAWS else (0, 100)
    points = [(x, float(np.median(at_round[x]))) for x in rounds]
    band = [(x, float(np.percentile(at_round[x], low)), float(np.percentile(at_round[x], high))) for x in rounds]
    return Series(arm, style, points, band=band if len(by_draw) > 1 else ())


def rate_figures(summary: Summary, arms: Sequence[str]) -> list[Figure]:
    """Return the validation loss over learning rates of the tuning draws, one figure a distribution."""
    shown = []
    for place, where in enumerate(summary.distributions):
        lines = [(arm, f"c{1 + n}") for n, arm in enumerate(arms)] + [(summary.reference, REFERENCE_STYLE)]
        series = [
            _rate_series(summary.rates[arm, where], style) for arm, style in lines if (arm, where) in summary.rates
        ]
        marks = sorted({x for line in series for x, _ in line.present})
        axis = Axis(
            "learning rates", lambda x: f"Learning rate {_rate(x)}", _rate, is_whole=False, marks=_thinned(marks)
        )
        chart = line_chart(series, what=f"Validation loss, {where}", from_zero=False, write=_loss, axis=axis)
        caption = "Mean over the tuning draws. Ring: the rate chosen. Rates that diverged on every draw are left out."
        shown.append(
            Figure(
                f"rates-{place}",
                where,
                "validation loss in nats per answer token, over the learning rate",
                caption,
                chart,
            )
        )
    return [figure for figure in shown if figure.chart is not None]


def _rate_series(choice: ChosenRate, style: str) -> Series:
    points = [
        (math.log10(one.learning_rate), one.mean_loss)
        for one in choice.tried
        if one.learning_rate > 0 and one.num_diverged < one.num_draws
    ]
    chosen = choice.chosen
    ring = None
    if chosen.mean_loss is not None and chosen.learning_rate > 0 and chosen.num_diverged < chosen.num_draws:
        ring = (math.log10(chosen.learning_rate), chosen.mean_loss)
    edge = f", {choice.edge} tried" if choice.edge else ""
    return Series(f"{choice.arm} at {choice.learning_rate:.2g}{edge}", style, points, ring=ring)


def _thinned(marks: list[float]) -> list[float]:
    """Return marks that leave room for their words."""
    kept: list[float] = []
    width = (marks[-1] - marks[0]) / 8 if marks else 0.0
    for mark in marks:
        if not kept or mark - kept[-1] >= width:
            kept.append(mark)
    return kept


def _rate(log_rate: float) -> str:
    return f"{10**log_rate:.2g}"


def _loss(value: float) -> str:
    return number_text(value, 3)


def _difference(value: float) -> str:
    return signed_text(value, 4)


def draws_words(summary: Summary) -> str:
    """Return how many draws the study has: ``8 test draws, 2 tuning draws``."""
    tests = len({row["draw"] for row in summary.runs})
    tuning = max((one.num_draws for choice in summary.rates.values() for one in choice.tried), default=0)
    return f"{count_text(tests, 'test draw')}, {count_text(tuning, 'tuning draw')}"
