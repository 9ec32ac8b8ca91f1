"""Names the robust rules and the smallest cohorts in which they hold; loads no torch, so that it is checked at once."""

from dataclasses import dataclass
from typing import Literal

RobustRule = Literal["norm_bound", "krum", "multi_krum", "trimmed_mean", "median_of_means"]


@dataclass(frozen=True)
class RobustSettings:
    """Which rule, and against how many.

    Attributes:
        rule: See ``flexlora.uplink.robust_weights``.
        num_malicious: ``f``; not used by ``norm_bound``.
        max_norm: ``M`` of ``norm_bound``; None is the median norm of the round.
    """

    rule: RobustRule
    num_malicious: int = 1
    max_norm: float | None = None


def least_clients(settings: RobustSettings) -> int:
    """Return the smallest cohort in which the rule holds against ``num_malicious``."""
    f = settings.num_malicious
    return {"norm_bound": 1, "krum": 2 * f + 3, "multi_krum": 2 * f + 3}.get(settings.rule, 2 * f + 1)
