"""Estimates how long a run still takes, from what its own trainings and answers have taken so far."""

import dataclasses
import time
from collections.abc import Callable
from typing import Literal

from flexlora.experiment.stages import Work

Kind = Literal["trainings", "answers"]


class TimeLeft:
    """Counts the work that is left, and the seconds that each kind of it takes.

    The seconds between two events belong to the kind of work that was going on; aggregation counts as training.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = self._last = clock()
        self._kind: Kind | None = None
        self._left: Work | None = None
        self._seconds: dict[Kind, float] = {"trainings": 0.0, "answers": 0.0}
        self._done: dict[Kind, float] = {"trainings": 0.0, "answers": 0.0}

    def begin(self, left: Work | None, kind: Kind | None = None) -> None:
        """Begin a stage; ``left`` is what the run has left from here on, None keeps what is known."""
        self.turn_to(kind)
        if left is not None:
            self._left = left

    def turn_to(self, kind: Kind | None) -> None:
        """Give the seconds since the last event to what has been going on, and begin another kind of work."""
        now = self._clock()
        if self._kind is not None:
            self._seconds[self._kind] += now - self._last
        self._last, self._kind = now, kind

    def add(self, kind: Kind, number: float) -> None:
        """Count finished work."""
        self.turn_to(kind)
        self._done[kind] += number
        if self._left is not None:
            left = max(0, getattr(self._left, kind) - number)
            self._left = dataclasses.replace(self._left, **{kind: left})

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._started

    def seconds_left(self) -> float | None:
        """Return about how many seconds are left; None as long as nobody knows."""
        if self._left is None:
            return None
        seconds = 0.0
        for kind in self._seconds:
            number = getattr(self._left, kind)
            if number and not self._done[kind]:
                return None
            seconds += number * self._seconds[kind] / (self._done[kind] or 1.0)
        return max(0.0, seconds - (self._clock() - self._last))
