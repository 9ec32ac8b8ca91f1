"""Says what paired differences show: interval, p-values, power, and how often a small repetition would disagree.

All tests are two-sided at `ALPHA`. Nothing here returns NaN: what cannot be said is None.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

ALPHA = 0.05
POWER_WANTED = 0.8
REPETITION_DRAWS = 3
"""Draws of the repetition whose disagreement is foreseen: what most papers use."""

MAX_DRAWS = 100_000
"""More draws than these are not counted out."""

MAX_SUBSETS = 50_000


@dataclass(frozen=True)
class PairStatistics:
    """What the differences of one pair of arms over draws show.

    Attributes:
        num_pairs: Draws that both arms have.
        sd: Standard deviation of the differences; None below two.
        low: Lower end of the 95 % interval of the mean by Student's t; None below two.
        p_t: Paired t-test; None below two, or if all differences are equal and not zero.
        p_wilcoxon: Wilcoxon's signed-rank test, exact, zeros dropped, ties at mid-ranks; None below two.
        p: The one that counts: `p_t`, or `p_wilcoxon` where there is none.
        test: Which of them `p` is.
        flip_observed: Share of all sets of `REPETITION_DRAWS` observed draws whose mean has the other sign, a mean of
            zero counted half; None unless there are more draws than that.
        flip_predicted: Probability that the mean of as many new draws has the other sign, by the predictive t
            distribution of normal differences.
        power: Of the paired t-test with as many draws, if mean and spread are as observed.
        draws_needed: Draws for a power of `POWER_WANTED`; None if unknown or above `MAX_DRAWS`.
        is_constant: All differences are equal, so their spread says nothing.
    """

    num_pairs: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p_t: float | None = None
    p_wilcoxon: float | None = None
    p: float | None = None
    test: Literal["t", "wilcoxon"] | None = None
    flip_observed: float | None = None
    flip_predicted: float | None = None
    power: float | None = None
    draws_needed: int | None = None
    is_constant: bool = False


def pair_statistics(differences: Sequence[float]) -> PairStatistics:
    """Return what one difference per draw shows.

    Args:
        differences: At least one, all finite.
    """
    count = len(differences)
    mean = math.fsum(differences) / count
    if count < 2:
        return PairStatistics(count, mean)
    sd = float(np.std(np.asarray(differences), ddof=1))
    largest = max(abs(value) for value in differences)
    p_wilcoxon = wilcoxon(differences)
    if sd <= 1e-9 * largest:
        return _without_spread(count, mean, largest, p_wilcoxon)
    error = sd / math.sqrt(count)
    half = float(stats.t.ppf(1 - ALPHA / 2, count - 1)) * error
    p_t = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return PairStatistics(
        num_pairs=count,
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        p_t=p_t,
        p_wilcoxon=p_wilcoxon,
        p=p_t,
        test="t",
        flip_observed=flip_observed(differences),
        flip_predicted=flip_predicted(mean, sd, count),
        power=power(abs(mean) / sd, count),
        draws_needed=draws_needed(abs(mean) / sd),
    )


def _without_spread(count: int, mean: float, largest: float, p_wilcoxon: float) -> PairStatistics:
    """Return what equal differences show: nothing if they are zero, else what their signs do."""
    zero = largest == 0
    return PairStatistics(
        num_pairs=count,
        mean=mean,
        sd=0.0,
        low=mean,
        high=mean,
        p_t=1.0 if zero else None,
        p_wilcoxon=p_wilcoxon,
        p=1.0 if zero else p_wilcoxon,
        test="t" if zero else "wilcoxon",
        flip_observed=None if zero or count <= REPETITION_DRAWS else 0.0,
        flip_predicted=None if zero else 0.0,
        power=None if zero else 1.0,
        draws_needed=None if zero else 2,
        is_constant=True,
    )


def wilcoxon(differences: Sequence[float]) -> float:
    """Return the exact two-sided p of Wilcoxon's signed-rank test; 1 if all differences are zero.

    Zeros are dropped. The null distribution is that of all signs of the observed mid-ranks, so ties are exact too.
    """
    present = [value for value in differences if value != 0]
    if not present:
        return 1.0
    # Twice the mid-ranks are whole numbers.
    doubled = [round(2 * rank) for rank in stats.rankdata([abs(value) for value in present])]
    total = sum(doubled)
    ways = np.zeros(total + 1)
    ways[0] = 1.0
    for rank in doubled:
        shifted = np.zeros_like(ways)
        shifted[rank:] = ways[: total + 1 - rank]
        ways = (ways + shifted) / 2
    positive = sum(rank for rank, value in zip(doubled, present, strict=True) if value > 0)
    return min(1.0, 2 * float(ways[: min(positive, total - positive) + 1].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down corrected p-values, in the order given (Scand. J. Statist. 6:65-70, 1979)."""
    corrected = [0.0] * len(p_values)
    reached = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        reached = max(reached, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = reached
    return corrected


def flip_observed(differences: Sequence[float], draws: int = REPETITION_DRAWS) -> float | None:
    """Return the share of all sets of ``draws`` differences whose mean has the sign that the whole has not.

    None unless there are more differences than ``draws``, or where the sets are too many to count.
    """
    count, overall = len(differences), math.fsum(differences)
    if count <= draws or math.comb(count, draws) > MAX_SUBSETS or overall == 0:
        return None
    sums = np.array([math.fsum(chosen) for chosen in itertools.combinations(differences, draws)]) * overall
    return float(np.mean((sums < 0) + 0.5 * (sums == 0)))


def flip_predicted(mean: float, sd: float, count: int, draws: int = REPETITION_DRAWS) -> float:
    """Return the probability that the mean of ``draws`` new differences has the other sign, if all are normal.

    The mean of new ones minus ``mean``, over ``sd sqrt(1/draws + 1/count)``, is Student's t with ``count - 1`` degrees
    of freedom, which accounts for how little ``mean`` and ``sd`` themselves are known.
    """
    return float(stats.t.sf(abs(mean) / (sd * math.sqrt(1 / draws + 1 / count)), count - 1))


def power(effect: float, count: int) -> float:
    """Return the power of the two-sided paired t-test with ``count`` pairs.

    Args:
        effect: Mean over standard deviation of the differences, not negative.
        count: At least two.
    """
    if effect == 0:
        return ALPHA
    critical = float(stats.t.ppf(1 - ALPHA / 2, count - 1))
    # The square of a non-central t is a non-central F, which scipy computes without gaps at large effects.
    return float(stats.ncf.sf(critical**2, 1, count - 1, count * effect**2))


def draws_needed(effect: float) -> int | None:
    """Return the least number of pairs with a power of `POWER_WANTED`; None above `MAX_DRAWS`."""
    if effect <= 0:
        return None
    normal = stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER_WANTED)
    count = max(2, math.floor((normal / effect) ** 2))
    if count > MAX_DRAWS:
        return None
    while power(effect, count) < POWER_WANTED:
        count += 1
    while count > 2 and power(effect, count - 1) >= POWER_WANTED:
        count -= 1
    return count if count <= MAX_DRAWS else None
