"""Which method has which identity; that it fails everywhere else shows that an identity can fail."""

from collections.abc import Callable
from typing import Any

import pytest

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.contract_compare import ContractError
from flexlora.aggregators.identities import (
    an_echo_of_all_ranks_changes_nothing,
    an_echo_of_some_clients_changes_nothing,
    every_rank_gets_the_best_approximation,
    the_model_is_the_mean_of_what_clients_ran,
)
from flexlora.aggregators.registry import AGGREGATORS, package_methods

EXACT = {"fed_svd", "fedex_lora", "flexlora", "flora"}
# Trainable parts of these are no slices of one decomposition; a method for one rank has nothing to slice.
SLICES = {"aligned", "fed_plora", "fed_svd", "fedsa_lora", "flexlora", "fs_lora", "ra_flora"}
FORGETFUL = {"fed_svd", "flexlora", "het_lora", "lora_fair", "zero_pad"}
METHODS = set(package_methods())
ONE_RANK = {name for name in METHODS if Case(AGGREGATORS[name], {}).traits.needs_one_rank}


def holds(identity: Callable[[Case], None], name: str, **options: Any) -> bool:
    try:
        identity(Case(AGGREGATORS[name], options))
    except ContractError:
        return False
    return True


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_identity_holds_for_the_methods_that_have_it_and_no_other(name: str) -> None:
    assert holds(the_model_is_the_mean_of_what_clients_ran, name) == (name in EXACT)
    assert holds(an_echo_of_all_ranks_changes_nothing, name) == (name not in FORGETFUL)
    assert holds(an_echo_of_some_clients_changes_nothing, name) == (name not in FORGETFUL)
    if name not in ONE_RANK:
        assert holds(every_rank_gets_the_best_approximation, name) == (name in SLICES)


def test_options_that_repair_a_method_give_it_its_identities() -> None:
    compensated = {"error_compensation": True}
    assert holds(an_echo_of_all_ranks_changes_nothing, "flexlora", **compensated)
    assert holds(an_echo_of_some_clients_changes_nothing, "flexlora", **compensated)
    assert not holds(the_model_is_the_mean_of_what_clients_ran, "flexlora", **compensated)
    assert holds(the_model_is_the_mean_of_what_clients_ran, "flexlora", **compensated, fold_tail=True)
    assert holds(the_model_is_the_mean_of_what_clients_ran, "florist", tau=1.0)
    assert not holds(the_model_is_the_mean_of_what_clients_ran, "fedex_lora", residual_rank=1)
    assert not holds(an_echo_of_all_ranks_changes_nothing, "flexlora", fold_tail=True)
