"""Chooses the learning rate of every arm of a comparison from its tuning draws."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from flexlora.report.measures import VALIDATION_LOSS, counted_value, went_wrong, worst_values
from flexlora.report.study_rows import Row

UNTRAINED = "base"
"""The arm that is not trained and has no learning rate."""


@dataclass(frozen=True)
class TriedRate:
    """One learning rate on the tuning draws of a distribution.

    Attributes:
        mean_loss: Mean validation loss, a run that went wrong at the worst of its draw; None if nothing is known.
        num_draws: Tuning draws it was tried on.
        num_diverged: Of them, those on which the run went wrong.
    """

    learning_rate: float
    mean_loss: float | None
    num_draws: int
    num_diverged: int


@dataclass(frozen=True)
class ChosenRate:
    """The learning rate of one arm on one distribution, and what it was chosen from.

    Attributes:
        edge: Where it lies among the rates that were compared: at the ``lowest`` or ``highest``, or it is the ``only``
            one; None inside. At an edge, a better rate may lie beyond.
        tried: Every rate, ascending, also those with fewer draws than the others, which were not compared.
    """

    arm: str
    distribution: str
    learning_rate: float
    edge: Literal["lowest", "highest", "only"] | None
    tried: tuple[TriedRate, ...]

    @property
    def is_at_edge(self) -> bool:
        """Whether a better rate may lie beyond those that were compared."""
        return self.edge is not None

    @property
    def chosen(self) -> TriedRate:
        """The rate itself, with its loss."""
        return next(one for one in self.tried if one.learning_rate == self.learning_rate)


def chosen_rates(rows: Iterable[Row]) -> dict[tuple[str, str], ChosenRate]:
    """Return (arm, distribution) -> the learning rate with the lowest mean validation loss over the tuning draws.

    Rates that were tried on fewer draws than others of the arm are not compared. A rate at which a run went wrong is
    taken only where one did at every rate. Of equal rates, the lower one is taken. Arms without tuning rows, and the
    base model, are left out.
    """
    rows = list(rows)
    tuning = [row for row in rows if row["phase"] == "tuning" and row["arm"] != UNTRAINED]
    worst = worst_values(rows, VALIDATION_LOSS)
    groups: defaultdict[tuple[str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in tuning:
        groups[row["arm"], row["distribution"]][float(row["learning_rate"])].append(row)
    return {key: _choice(*key, rates, worst) for key, rates in groups.items()}


def _choice(
    arm: str, distribution: str, rates: Mapping[float, list[Row]], worst: dict[tuple[str, int | None], float]
) -> ChosenRate:
    tried = tuple(_tried(rate, rates[rate], worst) for rate in sorted(rates))
    most = max(one.num_draws for one in tried)
    compared = [one for one in tried if one.num_draws == most]
    best = min(compared, key=lambda one: math.inf if one.mean_loss is None or one.num_diverged else one.mean_loss)
    edge = None
    if len(compared) == 1:
        edge = "only"
    elif best in (compared[0], compared[-1]):
        edge = "lowest" if best is compared[0] else "highest"
    return ChosenRate(arm, distribution, best.learning_rate, edge, tried)


def _tried(rate: float, rows: list[Row], worst: dict[tuple[str, int | None], float]) -> TriedRate:
    losses = [counted_value(row, VALIDATION_LOSS, worst) for row in rows]
    known = [loss for loss in losses if loss is not None]
    return TriedRate(
        learning_rate=rate,
        mean_loss=math.fsum(known) / len(known) if known else None,
        num_draws=len(rows),
        num_diverged=sum(went_wrong(row) for row in rows),
    )
