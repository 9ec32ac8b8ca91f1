"""Budgets are those that dp-accounting computes for the same schedule, and those of closed forms."""

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from flexlora.uplink import privacy_budget
from flexlora.uplink.privacy_budget import (
    ClientSampling,
    PrivacyBudget,
    PrivacyBudgetError,
    accountant_for,
    epsilon_of,
    noise_for,
    with_round,
)

dp_accounting = pytest.importorskip("dp_accounting")

DELTA = 1e-5
POISSON, FIXED, ALL = (
    ClientSampling("poisson", 200, 10),
    ClientSampling("fixed", 200, 10),
    ClientSampling("fixed", 12, 12),
)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Return the exact epsilon of one Gaussian release (arXiv:1805.06530, theorem 8)."""

    def delta_of(epsilon: float) -> float:
        half, shift = 0.5 / noise_multiplier, epsilon * noise_multiplier
        return norm.cdf(half - shift) - float(norm.cdf(-half - shift)) * 2.718281828459045**epsilon

    return float(brentq(lambda epsilon: delta_of(epsilon) - delta, 0, 100))


def test_full_participation_costs_what_the_closed_form_of_one_release_says() -> None:
    # T releases with noise multiplier z cost what one with z / sqrt(T) does.
    budget = PrivacyBudget(ALL, DELTA)
    assert epsilon_of(budget, ((6.0, 9),)) == pytest.approx(gaussian_epsilon(2.0, DELTA), rel=1e-3)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_poisson_sampling_costs_what_dp_accounting_says(accountant: str) -> None:
    from dp_accounting import pld, rdp

    ledger = pld.PLDAccountant() if accountant == "pld" else rdp.RdpAccountant()
    for noise_multiplier, count in ((1.2, 3), (2.0, 4)):
        event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(noise_multiplier))
        for _ in range(count):
            ledger.compose(event)
    budget = PrivacyBudget(POISSON, DELTA, accountant=accountant)  # type: ignore[arg-type]
    assert epsilon_of(budget, ((1.2, 3), (2.0, 4))) == pytest.approx(ledger.get_epsilon(DELTA), rel=1e-3)


def test_cohorts_of_fixed_size_are_accounted_for_with_twice_the_clip() -> None:
    from dp_accounting import rdp

    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    # A client in the place of another changes the sum by up to 2 C.
    event = dp_accounting.SampledWithoutReplacementDpEvent(200, 10, dp_accounting.GaussianDpEvent(1.5 / 2))
    expected = rdp.RdpAccountant(neighboring_relation=relation).compose(event, 30).get_epsilon(DELTA)
    found = epsilon_of(PrivacyBudget(FIXED, DELTA, accountant="rdp"), ((1.5, 30),))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found > epsilon_of(PrivacyBudget(POISSON, DELTA, accountant="rdp"), ((1.5, 30),))
    with pytest.raises(PrivacyBudgetError, match="no bound for cohorts of fixed size; choose rdp"):
        epsilon_of(PrivacyBudget(FIXED, DELTA), ((1.5, 1),))


def test_each_sampling_has_an_accountant() -> None:
    assert [accountant_for(one) for one in (POISSON, FIXED, ALL)] == ["pld", "rdp", "pld"]


@pytest.mark.parametrize("sampling", [POISSON, FIXED, ALL])
def test_the_noise_for_a_target_meets_it_closely(sampling: ClientSampling) -> None:
    noise_multiplier = noise_for(3.0, DELTA, sampling, 20, "rdp")
    spent = epsilon_of(PrivacyBudget(sampling, DELTA, accountant="rdp"), ((noise_multiplier, 20),))
    assert 2.98 < spent <= 3.0


def test_a_target_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(PrivacyBudgetError, match="no noise multiplier up to 10000 keeps 5 rounds within epsilon 1e-06"):
        noise_for(1e-6, 1e-12, ALL, 5, "rdp")


def test_spending_counts_rounds_by_their_noise() -> None:
    spending = ()
    for noise_multiplier in (1.0, 1.0, 2.0, 1.0):
        spending = with_round(spending, noise_multiplier)
    assert spending == ((1.0, 2), (2.0, 1), (1.0, 1))
    assert epsilon_of(PrivacyBudget(POISSON, DELTA), ()) == 0.0


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_budget, "find_spec", lambda name: None)
    with pytest.raises(PrivacyBudgetError, match=r"pip install 'flexlora\[privacy\]'"):
        epsilon_of(PrivacyBudget(ClientSampling("poisson", 50, 5), DELTA, accountant="rdp"), ((1.0, 1),))
