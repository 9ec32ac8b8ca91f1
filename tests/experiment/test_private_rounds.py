"""A configuration becomes a mechanism and a budget, with noise enough for its target."""

import pytest

from flexlora.aggregators.settings import Traits
from flexlora.experiment.config import Config
from flexlora.experiment.private_rounds import cohort_seed_of, privacy_estimate, privacy_of
from flexlora.experiment.round_loop import round_settings
from flexlora.rounds.loop_parts import Privacy
from flexlora.uplink.privacy_budget import PrivacyBudgetError

pytest.importorskip("dp_accounting")

RANKS = {"m": 4}


def made(num_clients: int = 200, cohort_size: int = 20, method: str = "aligned", **differential: object) -> Privacy:
    sections = {"privacy": {"differential": {"clip": 2.0, "accountant": "rdp", **differential}}, "seed": 5}
    config = Config.model_validate({**sections, "rounds": {"num_rounds": 10, "sampling": "poisson"}})
    privacy = privacy_of(config, Traits(private_changes="factors"), num_clients, cohort_size, RANKS, method)
    assert privacy is not None
    return privacy


def test_without_the_section_there_is_no_privacy() -> None:
    assert privacy_of(Config(), Traits(), 10, 2, RANKS, "fedit") is None


def test_the_noise_for_a_target_is_found_and_shown_with_what_it_buys() -> None:
    privacy = made(target_epsilon=4.0)
    estimate = privacy_estimate(privacy, 10)
    assert 3.95 < estimate.epsilon <= 4.0 and estimate.num_rounds == 10
    assert estimate.noise_multiplier == privacy.mechanism.noise_multiplier
    name, value = estimate.fact()
    assert name == "Privacy of a client"
    assert "on average 20 of 200 clients a round, by Poisson sampling, accountant rdp" in value


def test_a_budget_too_small_for_all_rounds_says_how_many_fit() -> None:
    all_rounds = privacy_estimate(made(noise_multiplier=1.0), 10).epsilon
    estimate = privacy_estimate(made(noise_multiplier=1.0, target_epsilon=0.8 * all_rounds), 10)
    assert 1 <= estimate.num_rounds < 10 and estimate.epsilon <= 0.8 * all_rounds
    more = privacy_estimate(made(noise_multiplier=1.0), estimate.num_rounds + 1)
    assert more.epsilon > 0.8 * all_rounds


def test_a_budget_too_small_for_one_round_is_refused() -> None:
    with pytest.raises(
        PrivacyBudgetError,
        match=r"target_epsilon must be at least .* what one round costs with noise multiplier 0\.3; got 0\.1",
    ):
        made(noise_multiplier=0.3, target_epsilon=0.1)


def test_a_method_without_a_bound_is_refused() -> None:
    config = Config.model_validate({"privacy": {"differential": {"clip": 1.0, "noise_multiplier": 1.0}}})
    with pytest.raises(PrivacyBudgetError, match="got median"):
        privacy_of(config, Traits(), 10, 2, RANKS, "median")


def test_loops_of_one_run_draw_noise_of_their_own_and_a_secret_seed_replaces_that_of_the_run() -> None:
    noise = {"noise_multiplier": 1.0}
    first = made(**noise).mechanism
    assert first == made(**noise).mechanism and first.denominator == 20.0
    others = [made(method="fedit", **noise), made(num_clients=100, **noise), made(noise_seed=6, **noise)]
    assert len({first.seed, *(other.mechanism.seed for other in others)}) == 4


def test_counting_clients_has_noise_of_a_twentieth_of_a_cohort_or_of_the_sum() -> None:
    small = made(noise_multiplier=1.5, adaptive={}).mechanism
    large = made(num_clients=2000, cohort_size=200, noise_multiplier=1.5, adaptive={"quantile": 0.8}).mechanism
    assert small.adaptive is not None and small.adaptive.count_noise == 1.5
    assert large.adaptive is not None and (large.adaptive.count_noise, large.adaptive.quantile) == (10.0, 0.8)


def test_cohorts_come_from_the_secret_seed_where_there_is_one() -> None:
    seeds = []
    for own in ({}, {"noise_seed": 6}, {"noise_seed": 7}):
        differential = {"clip": 1.0, "noise_multiplier": 1.0, **own}
        config = Config.model_validate({"privacy": {"differential": differential}, "seed": 5})
        seeds.append(round_settings(config, 3).cohort_seed)
        assert seeds[-1] == cohort_seed_of(config)
    assert seeds[0] is None and len({*seeds, 5, 6, 7}) == 6
    assert cohort_seed_of(Config()) is None
