"""Defines `privacy.differential`: how far one client may change what a run makes public, and what that costs."""

from typing import Literal

from pydantic import Field

from flexlora.experiment.config_section import Section


class AdaptiveClipConfig(Section):
    """Let the clip follow a quantile of the norms of clients' changes (arXiv:1905.03871)."""

    quantile: float = Field(
        default=0.5, gt=0, lt=1, description="Share of the clients whose changes the clip is to leave as they are."
    )
    step: float = Field(default=0.2, gt=0, description="How fast the clip moves, in the exponent.")
    count_noise: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Standard deviation of the noise on the number of clients within the clip; null is a 20th of a cohort, or "
            "`noise_multiplier` if that is more. It must be above half of `noise_multiplier`."
        ),
    )


class DifferentialConfig(Section):
    """Differential privacy of clients, added by a trusted server (needs the extra `flexlora[privacy]`)."""

    clip: float = Field(
        gt=0,
        description=(
            "Largest Frobenius norm, over all modules, of what a client changed against what it was sent; larger "
            "changes are scaled down to it. With `adaptive`, that of round 1."
        ),
    )
    noise_multiplier: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Standard deviation of the noise on the sum of a cohort, over the clip; null is the least that keeps "
            "`rounds.num_rounds` within `target_epsilon`."
        ),
    )
    target_epsilon: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Budget of the run, which ends before a round that would exceed it; null, which needs `noise_multiplier`, "
            "is none."
        ),
    )
    delta: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="Delta of the guarantee; it means little unless it is well below one over the number of clients.",
    )
    accountant: Literal["pld", "rdp"] | None = Field(
        default=None,
        description=(
            "Privacy loss distributions or Renyi accounting; null is the tightest that covers `rounds.sampling`: `rdp` "
            "for cohorts of fixed size, else `pld`."
        ),
    )
    adaptive: AdaptiveClipConfig | None = Field(default=None, description="null keeps the clip as it is.")
    noise_seed: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Seed of the noise and of the cohorts; null derives both from `seed`, which clients of a deployment know "
            "and must not. Draw one of 2^64 numbers at random: whoever knows or guesses it takes the noise off."
        ),
    )
