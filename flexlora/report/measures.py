"""Computes what a run of a comparison is judged by, and what a run that diverged counts as."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

from flexlora.report.study_rows import Row, number

LAST_SHARE = 0.25
"""Share of the rounds, counted from the end, whose evaluations make the measure "last rounds"."""

ALONE = "alone"
"""The control whose clients train alone."""


@dataclass(frozen=True)
class Measure:
    """One number by which a run is judged.

    Attributes:
        key: Its name in JSON.
        title: Its name for people.
        unit: In which it is given.
        value: Row -> value; None where it was not measured or is not finite.
        digits: Decimals that are worth printing.
        curve: What the curve of a run calls it, whose round 0 is the base model.
        is_shared: Measured on the same data for all, but for arms that have no model for it.
    """

    key: str
    title: str
    unit: str
    value: Callable[[Row], float | None]
    lower_is_better: bool = True
    digits: int = 4
    curve: str | None = None
    is_shared: bool = False


Scores = dict[tuple[str, str], dict[int, float]]
"""(distribution, arm) -> draw -> value."""


def area(curve: Sequence[tuple[float, float]]) -> float | None:
    """Return the mean height of a curve: its area by the trapezoid rule over the rounds it spans.

    A single point is its own mean; a curve without points has none.
    """
    points = sorted(curve)
    if len(points) < 2 or points[0][0] == points[-1][0]:
        return points[-1][1] if points else None
    pairs = itertools.pairwise(points)
    return sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairs) / (points[-1][0] - points[0][0])


def curve_of(row: Row, key: str) -> list[tuple[float, float]]:
    """Return (round, value) of the evaluations of a run that measured ``key`` and got a finite number."""
    points = [(number(point.get("round")), number(point.get(key))) for point in row["curve"] if isinstance(point, dict)]
    return [(x, y) for x, y in points if x is not None and y is not None]


def final_loss(row: Row, key: str) -> float | None:
    """Return the loss ``key`` (``unseen_loss`` or ``validation_loss``) of the last model of a run."""
    scored = _unseen("loss")(row) if key == "unseen_loss" else number(row.get(key))
    if scored is None:
        last = [y for x, y in curve_of(row, key) if x == row["rounds"]]
        return last[-1] if last else None
    return scored


def went_wrong(row: Row) -> bool:
    """Return whether a run diverged or failed: it says so, or has a loss that is not a number, or none at all."""
    if row.get("diverged") or row.get("failure"):
        return True
    unseen = row["unseen"].get("loss") if _is_scored(row) else None
    losses = [row.get("validation_loss"), row.get("own_loss"), unseen]
    if any(isinstance(loss, float) and not isfinite(loss) for loss in losses):
        return True
    if _is_scored(row) and number(unseen) is None:
        return True
    # Where nothing is validated, as for clients that train alone, another loss shows that the run went well.
    return all(number(loss) is None for loss in losses)


def is_personal(row: Row) -> bool:
    """Return whether each client has a model of its own, which is validated on its own data, not on everybody's."""
    return row["arm"] == ALONE or bool(row.get("personal"))


def scores(rows: Iterable[Row], measure: Measure) -> Scores:
    """Return the value of a measure for every run, those that went wrong at the worst value of their draw.

    The worst value is that of all runs of the same draw and distribution that went well, the base model included; if
    there is none, that of the distribution. Runs at several learning rates must be told apart before.
    """
    rows = [row for row in rows if not (measure.is_shared and is_personal(row))]
    worst = worst_values(rows, measure)
    found: Scores = defaultdict(dict)
    for row in rows:
        value = counted_value(row, measure, worst)
        if value is not None:
            found[row["distribution"], row["arm"]][row["draw"]] = value
    return dict(found)


def worst_values(rows: Iterable[Row], measure: Measure) -> dict[tuple[str, int | None], float]:
    """Return (distribution, draw) -> the worst value of a run that went well; draw None stands for all draws.

    The base model counts, with a run of its own or as what a curve starts from.
    """
    pick = max if measure.lower_is_better else min
    worst: dict[tuple[str, int | None], float] = {}
    for row in rows:
        start = dict(curve_of(row, measure.curve)).get(0.0) if measure.curve else None
        known = [start, None if went_wrong(row) else measure.value(row)]
        value = pick((one for one in known if one is not None), default=None)
        if value is None:
            continue
        for key in ((row["distribution"], row["draw"]), (row["distribution"], None)):
            worst[key] = pick(worst.get(key, value), value)
    return worst


def counted_value(row: Row, measure: Measure, worst: dict[tuple[str, int | None], float]) -> float | None:
    """Return what a run counts as; see `scores`. A run that went wrong is no missing one."""
    if went_wrong(row):
        return worst.get((row["distribution"], row["draw"]), worst.get((row["distribution"], None)))
    return measure.value(row)


def _is_scored(row: Row) -> bool:
    return isinstance(row.get("unseen"), dict)


def _unseen(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row["unseen"].get(key)) if _is_scored(row) else None


def _final(key: str) -> Callable[[Row], float | None]:
    return lambda row: final_loss(row, key)


def _area(key: str) -> Callable[[Row], float | None]:
    return lambda row: area(curve_of(row, key)) if row["rounds"] else final_loss(row, key)


def _last(key: str) -> Callable[[Row], float | None]:
    def mean(row: Row) -> float | None:
        if not row["rounds"]:
            return final_loss(row, key)
        values = [y for x, y in curve_of(row, key) if x > (1 - LAST_SHARE) * row["rounds"]]
        return sum(values) / len(values) if values else None

    return mean


NATS = "nats per answer token"


def _validation(key: str, title: str, value: Callable[[Row], float | None]) -> Measure:
    return Measure(key, title, NATS, value, curve="validation_loss", is_shared=True)


def _loss(key: str, title: str, value: Callable[[Row], float | None]) -> Measure:
    return Measure(key, title, NATS, value, curve="unseen_loss")


UNSEEN_LOSS = _loss("unseen_loss", "Loss on unseen tasks", _final("unseen_loss"))
VALIDATION_LOSS = _validation("validation_loss", "Validation loss", _final("validation_loss"))
MEASURES = (
    UNSEEN_LOSS,
    VALIDATION_LOSS,
    _loss("unseen_area", "Loss on unseen tasks, mean over rounds", _area("unseen_loss")),
    _validation("validation_area", "Validation loss, mean over rounds", _area("validation_loss")),
    _loss("unseen_last", "Loss on unseen tasks, last quarter", _last("unseen_loss")),
    _validation("validation_last", "Validation loss, last quarter", _last("validation_loss")),
    Measure("rouge_l", "ROUGE-L on unseen tasks", "0 to 100", _unseen("rouge_l"), False, 2),
    Measure("exact_match", "Exact match on unseen tasks", "% of answers", _unseen("exact_match"), False, 2),
    Measure("own_loss", "Loss on the clients' own test data", NATS, lambda r: number(r.get("own_loss"))),
)
"""The first is the headline."""
