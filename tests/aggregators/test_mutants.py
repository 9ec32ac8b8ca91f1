"""Each mistake that public code makes is caught by a named check, which the method itself passes.

A mutant is a method like any other, in a file of ``mutants``; its docstring says whose mistake it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flexlora.aggregators import contract, contract_state, identities
from flexlora.aggregators.contract_case import SCALINGS, Case
from flexlora.aggregators.contract_compare import ContractError
from flexlora.aggregators.registry import AGGREGATORS, load_file

Check = Callable[[Case], None]

FILES = sorted((Path(__file__).parent / "mutants").glob("*.py"))
CLASSES: Mapping[str, type] = {name: one for file in FILES for name, one in load_file(str(file)).items()}
SQUARE = {"attn.k_proj": (9, 9), "attn.q_proj": (9, 9), "mlp.down_proj": (9, 9)}
COMPENSATED = {"error_compensation": True}

# Mutant, the method it gets wrong, its options, and the check that catches it.
MUTANTS: list[tuple[str, str, dict[str, Any], Check]] = [
    ("root_split", "flexlora", {}, contract.one_client_is_a_fixed_point),
    ("no_scaling_on_arrival", "flexlora", {}, contract.one_client_is_a_fixed_point),
    ("alpha_sixteen", "flexlora", {}, contract.one_client_is_a_fixed_point),
    ("untransposed_v", "flexlora", {}, contract.broadcasts_have_the_ranks_asked_for),
    ("transposed_mean", "flexlora", {}, contract.broadcasts_have_the_ranks_asked_for),
    ("rank_never_applied", "flexlora", {}, contract.broadcasts_have_the_ranks_asked_for),
    ("unlisted_rank_gets_nothing", "flexlora", {}, contract.broadcasts_have_the_ranks_asked_for),
    ("dead_directions", "flexlora", {}, contract.broadcasts_have_the_ranks_asked_for),
    ("root_weights", "flexlora", {}, contract.traits_are_true),
    ("damped_compensation", "flexlora", COMPENSATED, identities.an_echo_of_all_ranks_changes_nothing),
    ("coverage_of_all_clients", "flexlora", COMPENSATED, identities.an_echo_of_some_clients_changes_nothing),
    ("ascending_values", "flexlora", {}, identities.every_rank_gets_the_best_approximation),
    ("signs_of_one_side", "flexlora", {}, contract.one_client_is_a_fixed_point),
    ("uniform_weights", "flexlora", {}, contract.two_halves_are_one_client),
    ("first_client_only", "fedit", {}, contract.the_order_of_clients_does_not_matter),
    ("sums_in_float32", "fedit", {}, contract.large_changes_that_cancel_leave_the_small_ones),
    ("sums_in_the_type_of_the_payload", "fedit", {}, contract.payloads_of_any_precision_are_taken),
    ("shared_state", "fedit", {}, contract.nothing_is_changed_or_shared),
    ("silent_broadcast", "zero_pad", {}, contract.one_client_is_a_fixed_point),
    ("raw_b", "zero_pad", {}, contract.one_client_is_a_fixed_point),
    ("aggregate_never_loaded", "zero_pad", {}, contract.one_client_is_a_fixed_point),
    ("column_weights_unused", "dimension_wise", {}, identities.an_echo_of_all_ranks_changes_nothing),
    ("weights_on_both_factors", "flora", {}, contract.clients_that_agree_are_one_client),
    ("stack_at_its_own_scaling", "flora", {}, contract.clients_that_agree_are_one_client),
    ("transposed_residual", "fedex_lora", {}, contract.frozen_branches_fit),
    ("residual_without_scaling", "fedex_lora", {}, identities.the_model_is_the_mean_of_what_clients_ran),
    ("uncovered_directions_are_lost", "ra_flora", {}, identities.an_echo_of_some_clients_changes_nothing),
    ("sketch_never_applied", "fs_lora", {}, contract.broadcasts_have_the_ranks_asked_for),
    ("mask_drawn_again", "slora", {}, contract.what_clients_can_make_is_what_they_would_make),
    ("sparse_stage_lost", "slora", {"sparse_rounds": 1}, contract.one_client_is_a_fixed_point),
]


def catches(check: Check, method: type, options: Mapping[str, Any]) -> bool:
    """Return whether a method breaks a rule under one of the scaling rules; other errors than that are not caught."""
    for scaling in SCALINGS:
        try:
            check(Case(method, options, scaling))
        except ContractError:
            return True
    return False


@pytest.mark.parametrize(("name", "genuine", "options", "check"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_mutant_is_caught_by_a_check_that_the_method_passes(
    name: str, genuine: str, options: dict[str, Any], check: Check
) -> None:
    assert not catches(check, AGGREGATORS[genuine], options)
    assert catches(check, CLASSES[name], options)


@pytest.mark.parametrize(("name", "genuine", "options", "check"), MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_a_mutant_is_a_method_that_runs(name: str, genuine: str, options: dict[str, Any], check: Check) -> None:
    case = Case(CLASSES[name], options, shapes=SQUARE)
    contract_state.it_describes_itself(case)
    contract_state.its_states_can_be_saved(case)


def test_every_mutant_is_tried() -> None:
    assert sorted(CLASSES) == sorted(mutant[0] for mutant in MUTANTS)


def test_alpha_sixteen_cannot_be_seen_where_alpha_is_sixteen() -> None:
    contract.one_client_is_a_fixed_point(Case(CLASSES["alpha_sixteen"], {}, SCALINGS[0]))


@pytest.mark.parametrize("name", ["untransposed_v", "transposed_mean"])
def test_square_modules_hide_a_transposition_from_every_look_at_shapes(name: str) -> None:
    contract.broadcasts_have_the_ranks_asked_for(Case(CLASSES[name], {}, shapes=SQUARE))
    with pytest.raises(ContractError, match="one client"):
        contract.one_client_is_a_fixed_point(Case(CLASSES[name], {}, shapes=SQUARE))


def test_square_modules_hide_a_transposed_residual_from_every_look_at_shapes() -> None:
    mutant = Case(CLASSES["transposed_residual"], {}, shapes=SQUARE)
    contract.frozen_branches_fit(mutant)
    with pytest.raises(ContractError, match="mean of what clients ran"):
        identities.the_model_is_the_mean_of_what_clients_ran(mutant)


@pytest.mark.parametrize("name", ["weights_on_both_factors", "stack_at_its_own_scaling", "residual_without_scaling"])
def test_one_client_alone_hides_what_is_wrong_with_sums(name: str) -> None:
    contract.one_client_is_a_fixed_point(Case(CLASSES[name], {}))
