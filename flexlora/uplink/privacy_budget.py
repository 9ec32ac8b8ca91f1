"""Accounts for the privacy that rounds of clipped and noised sums spend, with the package ``dp-accounting``.

The guarantee is (epsilon, delta) differential privacy of one client: of everything it has, not of one example. What it
covers are the states of the server after each round and all that is computed from them alone. Two samplings are known,
because a bound for one is none for the other:

- ``poisson``: each client takes part with one probability, on its own. Neighbours have one client more or less
  (add or remove), whose share of the sum is at most ``C``: the accountant's noise multiplier is ``z``.
- ``fixed``: a cohort of fixed size is drawn without replacement. Neighbours have one client in the place of another
  (replace), and their sums differ by up to ``2 C``: the accountant's noise multiplier is ``z / 2``
  (arXiv:1808.00087, theorem 27). ``dp-accounting`` knows it for Renyi accounting alone.

If everybody takes part in every round, nothing is hidden by sampling and the rule is that of ``poisson`` at
probability 1. All of it assumes that who takes part stays secret: the random stream of cohorts is as private as that of
the noise.
"""

# dp-accounting carries no type information and is an extra.
# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportMissingTypeStubs=false

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from flexlora.errors import FlexLoraError

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from dp_accounting.privacy_accountant import PrivacyAccountant

Accountant = Literal["pld", "rdp"]
"""Privacy loss distributions (tighter) or Renyi differential privacy."""


LARGEST_NOISE = 1e4
"""Noise multiplier above which no target is looked for."""


NOISE_TOLERANCE = 1e-3
"""How near to the smallest noise that meets a target the noise is that is found, always on the safe side."""


PLD_INTERVAL = 1e-3
"""Grid of privacy losses. Any grid gives a bound; a finer one lowers it by parts in 1e5 and takes long."""


class PrivacyBudgetError(FlexLoraError, ValueError):
    """A budget that cannot be accounted for, or a target that no noise meets."""


@dataclass(frozen=True)
class ClientSampling:
    """Who takes part in a round.

    Attributes:
        kind: ``poisson`` or ``fixed``; see the module.
        num_clients: Clients that can be sampled.
        cohort_size: Those that are, or the expected number.
    """

    kind: Literal["fixed", "poisson"]
    num_clients: int
    cohort_size: int

    @property
    def rate(self) -> float:
        """Share of the clients that take part in a round, on average."""
        return min(1.0, self.cohort_size / self.num_clients)


@dataclass(frozen=True)
class PrivacyBudget:
    """How spending is accounted for, and the most that may be spent.

    Attributes:
        sampling: Who takes part in a round.
        delta: Of the guarantee.
        target_epsilon: The run stops before a round that would exceed it; None never stops it.
        accountant: Of the bounds; ``fixed`` sampling of less than all needs ``rdp``.
    """

    sampling: ClientSampling
    delta: float
    target_epsilon: float | None = None
    accountant: Accountant = "pld"


Spending = tuple[tuple[float, int], ...]
"""Noise multipliers and the number of rounds with each, in order."""


def with_round(spending: Spending, noise_multiplier: float) -> Spending:
    """Return the spending after one more round."""
    if spending and spending[-1][0] == noise_multiplier:
        return (*spending[:-1], (noise_multiplier, spending[-1][1] + 1))
    return (*spending, (noise_multiplier, 1))


def require_accounting() -> None:
    """Raise unless the package that accounts is installed.

    Raises:
        PrivacyBudgetError: Naming the extra to install.
    """
    if find_spec("dp_accounting") is None:
        raise PrivacyBudgetError(
            "differential privacy needs the package dp-accounting; install it with: pip install 'flexlora[privacy]'"
        )


def accountant_for(sampling: ClientSampling) -> Accountant:
    """Return the accountant with the tightest bound for a sampling."""
    return "rdp" if sampling.kind == "fixed" and sampling.rate < 1.0 else "pld"


def epsilon_of(budget: PrivacyBudget, spending: Spending) -> float:
    """Return the epsilon that has been spent at ``budget.delta``; 0 before the first round.

    Raises:
        PrivacyBudgetError: If ``dp-accounting`` is missing, or the accountant does not know the sampling.
    """
    return _epsilon(spending, budget.sampling, budget.delta, budget.accountant) if spending else 0.0


def noise_for(
    target_epsilon: float, delta: float, sampling: ClientSampling, num_rounds: int, accountant: Accountant
) -> float:
    """Return the least noise multiplier with which so many rounds stay within ``target_epsilon``, to 0.1 %.

    Raises:
        PrivacyBudgetError: As ``epsilon_of``, or if no noise of practical size is enough.
    """

    def is_enough(noise_multiplier: float) -> bool:
        """Return whether all rounds with this noise stay within the target."""
        return _epsilon(((noise_multiplier, num_rounds),), sampling, delta, accountant) <= target_epsilon

    low, high = 0.0, 1.0
    while not is_enough(high):
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise PrivacyBudgetError(
                f"no noise multiplier up to {LARGEST_NOISE:g} keeps {num_rounds} rounds within epsilon "
                f"{target_epsilon:g} at delta {delta:g}; raise the target, or run fewer rounds with smaller cohorts"
            )
    while high - low > NOISE_TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _epsilon(spending: Spending, sampling: ClientSampling, delta: float, accountant: Accountant) -> float:
    ledger = _ledger(sampling, accountant)
    for noise_multiplier, num_rounds in spending:
        ledger.compose(_event(noise_multiplier, sampling), num_rounds)
    return float(ledger.get_epsilon(delta))


def _event(noise_multiplier: float, sampling: ClientSampling) -> "DpEvent":
    """Return one round as the accountant knows it."""
    require_accounting()
    from dp_accounting import dp_event

    if sampling.rate == 1.0:
        return dp_event.GaussianDpEvent(noise_multiplier)
    if sampling.kind == "poisson":
        return dp_event.PoissonSampledDpEvent(sampling.rate, dp_event.GaussianDpEvent(noise_multiplier))
    return dp_event.SampledWithoutReplacementDpEvent(
        sampling.num_clients, sampling.cohort_size, dp_event.GaussianDpEvent(noise_multiplier / 2)
    )


def _ledger(sampling: ClientSampling, accountant: Accountant) -> "PrivacyAccountant":
    """Return a fresh accountant for a sampling.

    Raises:
        PrivacyBudgetError: If there is none.
    """
    require_accounting()
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.privacy_accountant import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    is_replaced = sampling.kind == "fixed" and sampling.rate < 1.0
    if accountant == "rdp":
        relation = NeighboringRelation.REPLACE_ONE if is_replaced else NeighboringRelation.ADD_OR_REMOVE_ONE
        return RdpAccountant(neighboring_relation=relation)
    if is_replaced:
        raise PrivacyBudgetError(
            "accountant pld has no bound for cohorts of fixed size; choose rdp, or sample cohorts by poisson"
        )
    return PLDAccountant(value_discretization_interval=PLD_INTERVAL)
