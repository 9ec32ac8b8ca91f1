"""Says how far a difference between two models may be chance, by a paired bootstrap over tasks or clients of one run.

Both models are scored on the same units. Whole units are drawn again with replacement, `NUM_RESAMPLES` times, and the
interval is that of the middle 95 % of the differences of the weighted means (the percentile bootstrap). It covers the
choice of units and nothing else: another seed moves a run too, which ``flexlora compare`` measures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexlora.report.scores import finite
from flexlora.rounds.records import TaskScoreRecord
from flexlora.text import number_text, signed_text

NUM_RESAMPLES = 10_000
LEAST_TASKS = 8
"""Below this many units the percentile interval is far too narrow, so there is none."""
LEAST_CLIENTS = 30
"""Below this many clients nothing is claimed about a type."""
_CHUNK = 500


@dataclass(frozen=True)
class Difference:
    """One model minus another, in points of ROUGE-L, with its 95 % interval over ``num_units`` tasks or clients."""

    value: float
    low: float
    high: float
    num_units: int

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """``gains``, ``loses`` or ``not told apart``."""
        return "not told apart" if not self.is_told else "gains" if self.low > 0 else "loses"


def interval_text(difference: Difference | None) -> str:
    """Return an interval as it is written in tables; empty without one."""
    return "" if difference is None else f"{signed_text(difference.low)} to {signed_text(difference.high)}"


def task_difference(
    scores: Mapping[str, TaskScoreRecord], others: Mapping[str, TaskScoreRecord], least: int = LEAST_TASKS
) -> Difference | None:
    """Return how far ``scores`` is above ``others`` over the tasks of both, weighted by examples.

    None unless both have the same tasks, at least ``least`` of them, with finite scores.
    """
    if scores.keys() != others.keys():
        return None
    pairs = [(own.rouge_l, others[task].rouge_l, own.num_examples) for task, own in scores.items()]
    return paired_difference(pairs, least)


def paired_difference(pairs: Iterable[tuple[float, float, float]], least: int) -> Difference | None:
    """Return the weighted mean of first minus second with its interval; None below ``least`` units.

    Args:
        pairs: (value, other value, weight) of each unit.
        least: Fewest units for an interval.
    """
    present = [pair for pair in pairs if pair[2] > 0]
    if len(present) < max(least, 2) or any(finite(value) is None for pair in present for value in pair):
        return None
    values, others, weights = (np.array(column, dtype=np.float64) for column in zip(*present, strict=True))
    gains = weights * (values - others)
    means = _resampled_means(gains, weights)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Difference(float(gains.sum() / weights.sum()), low, high, len(present))


def _resampled_means(gains: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean of each resample; always the same ones, so that a page can be made again."""
    rng, count = np.random.default_rng(0), len(gains)
    chunks = []
    for _ in range(NUM_RESAMPLES // _CHUNK):
        times = rng.multinomial(count, np.full(count, 1 / count), size=_CHUNK)
        chunks.append((times @ gains) / (times @ weights))
    return np.concatenate(chunks)


@dataclass(frozen=True)
class Tally:
    """How many tasks one model scores higher on than another, lower, and the same; and where it loses most."""

    num_gained: int
    num_lost: int
    num_equal: int
    worst: Sequence[tuple[str, float]]


def tally(scores: Mapping[str, TaskScoreRecord], others: Mapping[str, TaskScoreRecord], most: int = 3) -> Tally | None:
    """Return on how many tasks ``scores`` is above ``others``; None without a task in common."""
    shared = {task: own.rouge_l - others[task].rouge_l for task, own in scores.items() if task in others}
    if not shared or any(finite(gain) is None for gain in shared.values()):
        return None
    lost = sorted((gain, task) for task, gain in shared.items() if gain < 0)
    gained = sum(gain > 0 for gain in shared.values())
    return Tally(gained, len(lost), len(shared) - gained - len(lost), [(task, gain) for gain, task in lost[:most]])


def difference_text(difference: Difference) -> str:
    """Return a difference with its interval in words, as ``+3.7 (+1.2 to +6.3)``."""
    return f"{signed_text(difference.value)} ({interval_text(difference)})"


def claim(difference: Difference | None, what: str) -> str:
    """Return whether a difference is real, in a few words."""
    if difference is None:
        return f"no interval: fewer than {number_text(LEAST_TASKS, 0)} {what} in common"
    return "the interval leaves zero out" if difference.is_told else "the interval includes zero: not told apart"
