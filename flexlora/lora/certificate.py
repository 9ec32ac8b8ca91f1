"""Says how good a truncated decomposition is, and whether that is good enough."""

from dataclasses import dataclass, replace
from math import hypot, sqrt
from typing import Literal

from torch import Tensor

Accuracy = Literal["exact", "fast"]
Algorithm = Literal["none", "qr", "gram", "subspace", "dense_gram", "dense_svd"]

TOLERANCE: dict[Accuracy, float] = {"exact": 1e-6, "fast": 1e-3}
"""Largest ``excess``: how much worse than the best approximation of the same rank an answer may be."""

FLOOR: dict[Accuracy, float] = {"exact": 1e-9, "fast": 1e-5}
"""Additive error, relative to the norm of the change, that is accepted where the best error is nearly zero."""

ROUNDING = 12
"""Units in the last place that a product with the sum is trusted to, relative to the root of the sum of the squares of
its terms. Errors of different terms are taken as independent; those of some thousand equal terms stay within it too."""


@dataclass(frozen=True)
class Certificate:
    """How good a truncated decomposition is: ``||P - U S Vh|| <= (1 + excess) best + rounding`` in Frobenius norm.

    Attributes:
        method: How it was found.
        reason: Why that way, in words.
        norm: Frobenius norm of the whole change.
        tail: Frobenius norm of what was discarded. Like ``norm`` estimated from random probes where the change was
            never formed (``method="subspace"``), to a few per cent.
        excess: Upper bound of the relative distance to the best approximation of the same rank.
        rounding: Upper bound of what limited precision adds, absolute.
        failure_probability: Chance that the bound does not hold; 0 where nothing random was used.
        spread: How far from ``tail`` what was discarded may be, where that is an estimate.
    """

    method: Algorithm
    reason: str
    norm: float
    tail: float
    excess: float = 0.0
    rounding: float = 0.0
    failure_probability: float = 0.0
    spread: float = 0.0

    @property
    def error(self) -> float:
        """Upper bound of the norm of what was discarded, rounding included."""
        return self.tail + self.spread + self.rounding

    @property
    def optimal(self) -> float:
        """Lower bound of the distance of the best approximation of this rank, to the digits that ``tail`` has."""
        return max(0.0, self.tail - self.spread - self.rounding) / (1.0 + self.excess)

    @property
    def energy_kept(self) -> float:
        """Share in 0..1 of the squared norm that was kept, an estimate where ``spread`` is above 0."""
        return max(0.0, 1.0 - (self.tail / self.norm) ** 2) if self.norm > 0 else 1.0

    @property
    def largest_norm(self) -> float:
        """Upper bound of the norm of the whole change."""
        captured = sqrt(max(0.0, self.norm - self.tail)) * sqrt(self.norm + self.tail)
        return hypot(captured, self.tail + self.spread)

    @property
    def least_energy_kept(self) -> float:
        """Lower bound of the share that was kept."""
        return 1.0 - ((self.tail + self.spread) / self.largest_norm) ** 2 if self.norm > 0 else 1.0

    def scaled(self, factor: float) -> "Certificate":
        """Return the certificate of the change times ``factor`` > 0."""
        scaled = {name: getattr(self, name) * factor for name in ("norm", "tail", "rounding", "spread")}
        return replace(self, **scaled)


def verdict_on(missed: float, tail2: float, total: float, accuracy: Accuracy) -> tuple[float, float] | None:
    """Return excess and rounding of an answer that misses at most ``missed`` of the best energy; None if too much.

    Args:
        missed: Upper bound of the best captured energy minus the captured one.
        tail2: Lower bound of the energy that the answer discards.
        total: Energy of the whole.
        accuracy: What is asked for.
    """
    best = tail2 - missed
    if best > 0:
        excess = sqrt(1 + missed / best) - 1
        if excess <= TOLERANCE[accuracy]:
            return excess, 0.0
    if sqrt(missed) <= FLOOR[accuracy] * sqrt(total):
        return 0.0, sqrt(missed)
    return None


def spread_of(tail2: float, missed: float) -> float:
    """Return how far from ``sqrt(tail2)`` the norm of what is discarded may be if ``tail2`` is off by ``missed``."""
    return sqrt(tail2) - sqrt(max(0.0, tail2 - missed)) if missed < tail2 else sqrt(tail2 + missed)


def lost_to_rounding(theta: Tensor, k: int, rounding2: float) -> float:
    """Return what picking ``k`` of the singular vectors of ``P + E`` instead of ``P`` can cost in captured energy.

    With a gap after ``k`` that ``E`` cannot close, mixing across it costs at most ``sum |E_ij|^2 sigma_i^2 / (sigma_i^2
    - sigma_j^2)`` and the factors' own errors ``|E|^2``; without one, directions change places whose values are as near
    as ``E`` is large.

    Args:
        theta: Squared singular values, descending, as far as they are known.
        k: Number picked.
        rounding2: ``|E|^2``, Frobenius norm.
    """
    here = float(theta[k - 1])
    following = float(theta[k]) if k < theta.shape[0] else 0.0
    size, gap = sqrt(rounding2), sqrt(here) - sqrt(following)
    linear = rounding2 + 4 * k * sqrt(here) * size
    if gap <= 4 * size:
        return linear
    mixing = 2 * (gap / (gap - 2 * size)) ** 2 * here / (here - following)
    return min(linear, rounding2 * (1 + mixing))


def together(missed: float, lost: float) -> float:
    """Return what is missed at most if two causes turn the answer the same way."""
    return (sqrt(missed) + sqrt(lost)) ** 2
