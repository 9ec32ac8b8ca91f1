"""Makes the mechanism and the budget of a run with differential privacy from its configuration."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from flexlora.aggregators.settings import Traits
from flexlora.experiment.config import Config
from flexlora.federation.streams import stream_seed
from flexlora.rounds.loop_parts import Privacy
from flexlora.uplink.clip_and_noise import AdaptiveClip, ClipAndNoise
from flexlora.uplink.privacy_budget import (
    ClientSampling,
    PrivacyBudget,
    PrivacyBudgetError,
    Spending,
    accountant_for,
    epsilon_of,
    noise_for,
)

COUNTED_SHARE = 20
"""Times that a cohort is the default noise on the count of clients within the clip (arXiv:1905.03871)."""


@dataclass(frozen=True)
class PrivacyEstimate:
    """What a run will spend.

    Attributes:
        epsilon: After all rounds, or after those that the budget allows.
        delta: Of the guarantee.
        noise_multiplier: Of every round.
        num_rounds: Rounds that the budget allows, at most those of the run.
        sampling: In words.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    num_rounds: int
    sampling: str

    def fact(self) -> tuple[str, str]:
        """Return a name and what it costs for a person."""
        return (
            "Privacy of a client",
            f"epsilon {self.epsilon:.3g} at delta {self.delta:g} after {self.num_rounds} rounds, noise multiplier "
            f"{self.noise_multiplier:.4g}, {self.sampling}",
        )


def privacy_of(
    config: Config, traits: Traits, num_clients: int, cohort_size: int, ranks: Mapping[str, int], method: str
) -> Privacy | None:
    """Return how the rounds of a loop are made private; None if they are not.

    Every loop of a run draws noise of its own: the same noise under two methods could be taken off by subtracting.

    Args:
        config: Of the run.
        traits: Of the method of the loop.
        num_clients: Clients that the loop can sample.
        cohort_size: Those that it does, on average.
        ranks: Module path -> rank of the server's adapter.
        method: Name of the method of the loop.

    Raises:
        PrivacyBudgetError: If the target cannot be met, or not even one round fits.
    """
    differential = config.privacy.differential
    if differential is None:
        return None
    if traits.private_changes is None:
        raise PrivacyBudgetError(
            f"privacy.differential needs a method in which one client's share of a round has a bound; got {method}"
        )
    sampling = ClientSampling(config.rounds.sampling, num_clients, cohort_size)
    budget = PrivacyBudget(
        sampling,
        differential.delta,
        differential.target_epsilon,
        differential.accountant or accountant_for(sampling),
    )
    noise = differential.noise_multiplier
    if noise is None:
        assert differential.target_epsilon is not None, "the configuration is checked"
        noise = noise_for(
            differential.target_epsilon, differential.delta, sampling, config.rounds.num_rounds, budget.accountant
        )
    adaptive = None
    if differential.adaptive is not None:
        count_noise = differential.adaptive.count_noise or max(noise, cohort_size / COUNTED_SHARE)
        adaptive = AdaptiveClip(differential.adaptive.quantile, differential.adaptive.step, count_noise)
    seed = config.seed if differential.noise_seed is None else differential.noise_seed
    own = stream_seed(seed, "privacy", method, num_clients, json.dumps(dict(sorted(ranks.items()))))
    mechanism = ClipAndNoise(differential.clip, noise, float(cohort_size), traits.private_changes, own, adaptive)
    privacy = Privacy(mechanism, budget)
    first, target = epsilon_of(budget, ((noise, 1),)), differential.target_epsilon
    if target is not None and first > target:
        raise PrivacyBudgetError(
            f"privacy.differential.target_epsilon must be at least {first:.4g}, what one round costs with noise "
            f"multiplier {noise:g}; got {target:g}: raise it, or noise_multiplier, or set the latter to null"
        )
    return privacy


def cohort_seed_of(config: Config) -> int | None:
    """Return the seed of the cohorts where it is not that of the run: sampling hides nobody from one who knows it."""
    differential = config.privacy.differential
    if differential is None or differential.noise_seed is None:
        return None
    return stream_seed(differential.noise_seed, "privacy-cohorts")


def privacy_estimate(privacy: Privacy, num_rounds: int) -> PrivacyEstimate:
    """Return what a run of so many rounds spends, or of as many as its budget allows."""
    noise, budget = privacy.mechanism.noise_multiplier, privacy.budget

    def spending(rounds: int) -> Spending:
        """Return that of so many rounds."""
        return ((noise, rounds),)

    allowed, target = num_rounds, budget.target_epsilon
    if target is not None and epsilon_of(budget, spending(num_rounds)) > target:
        allowed, beyond = 1, num_rounds
        while beyond - allowed > 1:
            middle = (allowed + beyond) // 2
            if epsilon_of(budget, spending(middle)) <= target:
                allowed = middle
            else:
                beyond = middle
    sampling = budget.sampling
    drawn = f"{sampling.cohort_size} of {sampling.num_clients} clients a round"
    words = f"on average {drawn}, by Poisson sampling" if sampling.kind == "poisson" else f"{drawn}, drawn at random"
    epsilon = epsilon_of(budget, spending(allowed))
    return PrivacyEstimate(epsilon, budget.delta, noise, allowed, f"{words}, accountant {budget.accountant}")
