"""Defines what a run tells progress displays about: its stages and, within them, scoring and what is left in all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    # A display is shown before torch is imported, which round loops need.
    from flexlora.rounds.loop_parts import RoundEvent


@dataclass(frozen=True)
class Work:
    """Units of work that take most of a run's time.

    Attributes:
        trainings: Times that a client trains.
        answers: Answers that are generated and scored.
    """

    trainings: float = 0
    answers: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.trainings + other.trainings, self.answers + other.answers)


@dataclass(frozen=True)
class Stage:
    """One part of a run, for progress displays.

    Attributes:
        title: What it is called.
        num_steps: How many steps it has, None where nobody knows.
        completed: How many of them are done already.
        notes: What to know about it.
        left: What the run has left to do, this stage and all after it; None where that is not known yet.
        trainings_per_step: How many trainings of a round one step takes as long as.
    """

    title: str
    num_steps: int | None = None
    completed: int = 0
    notes: tuple[str, ...] = ()
    left: Work | None = None
    trainings_per_step: float = 1.0


@dataclass(frozen=True)
class Scoring:
    """How far the scoring of one model is.

    Attributes:
        done: Answers generated so far, of ``num_answers``.
        subject: What is scored.
    """

    done: int
    num_answers: int
    subject: str = "scoring"


Notify: TypeAlias = "Callable[[RoundEvent | Stage | Scoring], None]"


def ignore(event: "RoundEvent | Stage | Scoring") -> None:
    """Show nothing."""
