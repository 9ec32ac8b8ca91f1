"""Decides which runs a comparison still needs, from the rows it has: first tuning draws, then the draws that count."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flexlora.experiment.compare_arms import Arm

Phase = Literal["tuning", "test"]
Row = Mapping[str, Any]

FIRST_TEST_SEED = 1000
"""Tuning draws count from the configuration's seed and the others from this much above it: they are never the same."""

RATE_FACTOR = 2.0


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        phase: ``tuning`` runs choose learning rates and are never scored on unseen tasks.
        draw: Number within the phase.
        seed: Of everything that is drawn.
        distribution: Of the client types.
        arm: Label.
        learning_rate: What the schedule starts from; 0 for the base.
    """

    phase: Phase
    draw: int
    seed: int
    distribution: str
    arm: str
    learning_rate: float

    @property
    def key(self) -> tuple[str, int, str, str, float]:
        """What tells jobs apart."""
        return self.phase, self.draw, self.distribution, self.arm, self.learning_rate


@dataclass(frozen=True)
class Study:
    """What is compared, on what.

    Attributes:
        config: Path of the configuration.
        settings: What was in it, with all overrides and defaults, as YAML: a file that changes later changes nothing.
        overrides: ``key=value`` settings that all arms share.
        arms: Methods and controls.
        distributions: Of client types, each compared by itself.
        supports: Distribution -> the client types that occur in it; arms that do not depend on who has which rank run
            once for all distributions with the same types.
        draws: Draws that count.
        tuning_draws: Draws on which learning rates are chosen; 0 takes the configuration's.
        trials: Most learning rates tried for each arm.
        learning_rate: Where the trials start.
        seed: Of the configuration.
        evaluations: Points of each learning curve.
        text: Whether answers are generated and scored at the end of each run.
        tune_on: The distribution whose tuning draws choose for all; None chooses for each by itself.
    """

    config: str
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    distributions: tuple[str, ...]
    supports: Mapping[str, tuple[str, ...]]
    draws: int
    tuning_draws: int
    trials: int
    learning_rate: float
    seed: int
    settings: str = ""
    evaluations: int = 8
    text: bool = True
    tune_on: str | None = None

    def tuned_for(self, arm: Arm, distribution: str) -> str:
        """Return the distribution whose tuning draws choose the learning rate for this one."""
        return self.run_for(arm, self.tune_on or distribution)

    def run_for(self, arm: Arm, distribution: str) -> str:
        """Return the distribution whose run serves this one too."""
        if arm.depends_on_ranks:
            return distribution
        return next(other for other in self.distributions if self.supports[other] == self.supports[distribution])

    def served_by(self, job: Job) -> list[str]:
        """Return the other distributions that the run of a job serves."""
        arm = next(arm for arm in self.arms if arm.label == job.arm)
        own, of = job.distribution, self.tuned_for if job.phase == "tuning" else self.run_for
        return [other for other in self.distributions if other != own and of(arm, other) == own]


def due_jobs(study: Study, rows: Iterable[Row]) -> list[Job]:
    """Return the jobs that can run now, tuning first; none once the comparison is complete.

    Args:
        study: The comparison.
        rows: Of finished runs, in any order.
    """
    done = {_key_of(row): row for row in rows}
    found: list[Job] = []
    for arm in study.arms:
        for distribution in study.distributions:
            if study.run_for(arm, distribution) == distribution:
                found += _due_of(study, arm, distribution, done)
    return sorted(found, key=lambda job: (job.phase != "tuning", job.draw, study.distributions.index(job.distribution)))


def num_jobs_left(study: Study, rows: Iterable[Row]) -> dict[Phase, int]:
    """Return phase -> about how many jobs are left, those included that only a later choice makes due."""
    done = {_key_of(row): row for row in rows}
    left: dict[Phase, int] = {"tuning": 0, "test": 0}
    for arm in study.arms:
        for distribution in study.distributions:
            if study.run_for(arm, distribution) == distribution:
                for job in _due_of(study, arm, distribution, done):
                    left[job.phase] += 1
                if not isinstance(_choice(study, arm, distribution, done), int | float):
                    left["test"] += study.draws
    return left


def _due_of(study: Study, arm: Arm, distribution: str, done: Mapping[Any, Row]) -> list[Job]:
    choice = _choice(study, arm, distribution, done)
    if isinstance(choice, int | float):
        jobs = [
            Job("test", draw, study.seed + FIRST_TEST_SEED + draw, distribution, arm.label, choice)
            for draw in range(study.draws)
        ]
    else:
        jobs = [
            Job("tuning", draw, study.seed + draw, distribution, arm.label, rate)
            for rate in choice
            for draw in range(study.tuning_draws)
            if study.tuned_for(arm, distribution) == distribution
        ]
    return [job for job in jobs if job.key not in done]


def _choice(study: Study, arm: Arm, distribution: str, done: Mapping[Any, Row]) -> float | Sequence[float]:
    """Return the learning rate of an arm, or those to try next.

    Trials begin with the start and its neighbours, and go on at the better edge until the best lies inside.
    """
    if arm.kind == "base":
        return 0.0
    if arm.learning_rate is not None:
        return arm.learning_rate
    if not study.tuning_draws:
        return arm.start or study.learning_rate
    tuned, start = study.tuned_for(arm, distribution), arm.start or study.learning_rate
    powers = [-1, 0, 1] if study.trials >= 3 else list(range(study.trials))
    while True:
        rates = {power: start * RATE_FACTOR**power for power in powers}
        losses = {power: _tuning_loss(study, arm, tuned, rate, done) for power, rate in rates.items()}
        if missing := [rates[power] for power, loss in losses.items() if loss is None]:
            return missing
        best = min(losses, key=lambda power: (losses[power], power))
        following = best - 1 if best == min(powers) else best + 1 if best == max(powers) else None
        if following is None or len(powers) >= study.trials:
            return rates[best]
        powers.append(following)


def _tuning_loss(study: Study, arm: Arm, distribution: str, rate: float, done: Mapping[Any, Row]) -> float | None:
    """Return the mean validation loss of a rate over the tuning draws, infinite if one diverged, None if any lacks."""
    rows = [done.get(("tuning", draw, distribution, arm.label, rate)) for draw in range(study.tuning_draws)]
    if any(row is None for row in rows):
        return None
    losses = [_loss_of(row) for row in rows if row is not None]
    return math.fsum(losses) / len(losses)


def _loss_of(row: Row) -> float:
    loss = row.get("validation_loss")
    return math.inf if loss is None or row.get("diverged") or row.get("failure") else float(loss)


def _key_of(row: Row) -> tuple[str, int, str, str, float]:
    return row["phase"], row["draw"], row["distribution"], row["arm"], row["learning_rate"]
