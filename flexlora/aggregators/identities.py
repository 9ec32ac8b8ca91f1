"""Identities that some methods have and others do not: what ``contract`` cannot demand of all of them.

Each is a function of a ``Case`` that raises ContractError where it does not hold. Expected numbers come from numpy:
dense sums in float64 and its singular value decomposition.
"""

from collections.abc import Sequence

import numpy as np

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.contract_client import ran, with_own_factors
from flexlora.aggregators.contract_compare import Deltas, best_approximation, change_of, require_equal
from flexlora.federation.messages import Broadcast, Update


def the_model_is_the_mean_of_what_clients_ran(case: Case) -> None:
    """``G+ = sum_i w_i W_i``, ``W_i`` all that client ``i`` ran, or its best approximation of the server's rank.

    The best approximation where the model of the server's rank has no frozen branch to hold the rest.
    """
    state = case.after_a_round()
    sent, updates = exchange(case, state, seed=1)
    expected = mean_of_models(sent, updates)
    after = case.aggregator.aggregate(state, updates)
    if case.broadcast(after).frozen is None:
        expected = {module: best_approximation(delta, case.server_rank) for module, delta in expected.items()}
    require_equal(case.deltas(after), expected, "the model must be the mean of what clients ran")


def every_rank_gets_the_best_approximation(case: Case) -> None:
    """What a client of rank ``r`` trains is ``T_r(G)`` (Eckart and Young), for every rank that there may be."""
    state = case.after_a_round()
    whole = {module: spectrum.delta().numpy() for module, spectrum in case.aggregator.spectra(state).items()}
    for rank in [case.server_rank] if case.traits.needs_one_rank else range(1, case.server_rank + 1):
        trainable = case.aggregator.broadcast(state, case.all_modules(rank)).trainable
        expected = {module: best_approximation(delta, rank) for module, delta in whole.items()}
        require_equal(
            change_of(Broadcast(trainable)), expected, f"a client of rank {rank} must get the best of its rank"
        )


def an_echo_of_all_ranks_changes_nothing(case: Case) -> None:
    """If every client returns what it was sent, whatever its rank, the model stays as it is."""
    _require_echo_to_change_nothing(case, range(len(case.plans())))


def an_echo_of_some_clients_changes_nothing(case: Case) -> None:
    """The same in a round in which clients of small ranks alone take part."""
    _require_echo_to_change_nothing(case, [0, len(case.plans()) - 1])


def exchange(case: Case, state: object, seed: int, step: float = 0.3) -> tuple[list[Broadcast], list[Update]]:
    """Return what every client of a round is sent, and what it returns after training."""
    updates = case.updates(state, seed, step)
    sent = [case.broadcast(state, plan, str(one.client_id)) for plan, one in zip(case.plans(), updates, strict=True)]
    return sent, updates


def mean_of_models(sent: Sequence[Broadcast], updates: Sequence[Update]) -> Deltas:
    """Return ``sum_i w_i W_i`` per module, ``W_i`` being trained and frozen part of what client ``i`` ran, by numpy."""
    models = [change_of(with_own_factors(ran(one, update))) for one, update in zip(sent, updates, strict=True)]
    weights = np.array([update.weight for update in updates]) / sum(update.weight for update in updates)
    return {
        module: np.sum([weight * model[module] for weight, model in zip(weights, models, strict=True)], axis=0)
        for module in models[0]
    }


def _require_echo_to_change_nothing(case: Case, clients: Sequence[int]) -> None:
    state = case.after_a_round()
    _, echoes = exchange(case, state, seed=0, step=0.0)
    before = case.deltas(state)
    after = case.aggregator.aggregate(state, [echoes[index] for index in clients])
    require_equal(case.deltas(after), before, "clients that return what they were sent must change nothing")
