"""Defines `rounds.robust`: how far the clients of a cohort are believed."""

from typing import Literal

from pydantic import Field

from flexlora.experiment.config_section import Section


class RobustConfig(Section):
    """Aggregate so that a few clients that lie do little harm; every client counts the same then."""

    rule: Literal["norm_bound", "krum", "multi_krum", "trimmed_mean", "median_of_means"] = Field(
        description=(
            "`norm_bound` scales large changes down, `krum` takes the one client nearest to others, `multi_krum` the "
            "mean of all but the `num_malicious` worst, `trimmed_mean` that of those nearest to the middle one, "
            "`median_of_means` the middle one of the means of groups."
        )
    )
    num_malicious: int = Field(
        default=1, ge=1, description="Clients of a cohort that may lie; `norm_bound` does not ask."
    )
    max_norm: float | None = Field(
        default=None,
        gt=0,
        description="Largest norm of a client's change with `norm_bound`; null is the median of the round.",
    )
