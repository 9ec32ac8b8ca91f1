"""Holds the methods of a merge: what each adapter's change is multiplied by in a module."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Missing = Literal["zero", "renormalise"]


Coefficients = Callable[[Sequence[float], Sequence[bool], Missing], list[float]]


def _mean(weights: Sequence[float], has: Sequence[bool], missing: Missing) -> list[float]:
    """Return ``w_i / sum w``; the sum is over all adapters, or over those that have the module."""
    counted = [weight for weight, here in zip(weights, has, strict=True) if here or missing == "zero"]
    # Over the largest first, because a sum of huge weights is infinite.
    largest = max(counted)
    total = sum(weight / largest for weight in counted)
    return [weight / largest / total for weight in weights]


def _sum(weights: Sequence[float], has: Sequence[bool], missing: Missing) -> list[float]:
    return list(weights)


COEFFICIENTS: Mapping[str, Coefficients] = {"mean": _mean, "sum": _sum}
"""Method -> the coefficients of the adapters in a module, from their weights and from who has the module."""
