"""Every method of the package keeps the contract, and says in its own words what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract import (
    CHECKS,
    broadcasts_have_the_ranks_asked_for,
    clients_that_agree_are_one_client,
    one_client_is_a_fixed_point,
)
from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, SHAPES, Case, all_modules, initial_adapter
from flexlora.aggregators.registry import AGGREGATORS, package_methods
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Update
from flexlora.testing import its_checkpoints_come_back, messages_have_the_size_that_their_fields_say

ROOT = Path(__file__).parents[2]
DEFAULTS = [Case(AGGREGATORS[name], {}) for name in package_methods()]
VARIANTS = [
    Case(AGGREGATORS[name], options)
    for name, options in (
        ("aligned", {"holder_exponent": 1.0, "fold_tail": False}),
        ("aligned", {"decompose_every": None, "split": "balanced"}),
        ("aligned", {"holder_exponent": 0.5, "server_learning_rate": 0.5}),
        ("fed_plora", {"selection": "first"}),
        ("fed_sb", {"refresh_every": 1}),
        ("fed_sb", {"warmup_rounds": 2}),
        ("fedex_lora", {"residual_rank": 2}),
        ("fedex_lora", {"uniform_weights": True}),
        ("flexlora", {"error_compensation": True}),
        ("flexlora", {"fold_tail": True}),
        ("flexlora", {"error_compensation": True, "fold_tail": True}),
        ("flexlora", {"split": "balanced"}),
        ("flexlora", {"server_rank": 7}),
        ("flexlora", {"server_rank": 5}),
        ("flexlora", {"server_learning_rate": 0.5}),
        ("flexlora", {"server_momentum": 0.5, "error_compensation": True}),
        ("flexlora", {"energy": 0.9}),
        ("flexlora", {"energy": 1.0}),
        ("flexlora", {"energy": 0.9, "error_compensation": True, "fold_tail": True}),
        ("flexlora", {"energy": 0.9, "server_momentum": 0.5}),
        ("flora", {"redraw_seed": 3}),
        ("florist", {"tau": 0.5}),
        ("het_lora", {"norm_weights": False, "self_pruning": False}),
        ("slora", {"sparse_rounds": 1}),
        ("slora", {"sparse_rounds": 1, "stage_two": "flexlora"}),
        ("slora", {"sparse_rounds": 2, "stage_two": "flexlora"}),
    )
]
CASES = [*DEFAULTS, *VARIANTS]
# Under constant alpha, scalings differ between ranks; under the other rules only what multiplies by them can change.
OTHER_SCALINGS = [replace(case, scaling=scaling) for case in DEFAULTS for scaling in SCALINGS[1:]]
SCALED = [broadcasts_have_the_ranks_asked_for, one_client_is_a_fixed_point, clients_that_agree_are_one_client]


def words(case: Case) -> str:
    options = [f"{name}={value}" for name, value in case.options.items()]
    return "-".join([case.method.__name__, *options, case.scaling.policy])


every_case = pytest.mark.parametrize("case", CASES, ids=words)


@every_case
@pytest.mark.parametrize(
    "check",
    [*CHECKS, its_checkpoints_come_back, messages_have_the_size_that_their_fields_say],
    ids=lambda check: check.__name__,
)
def test_the_contract_holds(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


@pytest.mark.parametrize("case", OTHER_SCALINGS, ids=words)
@pytest.mark.parametrize("check", SCALED, ids=lambda check: check.__name__)
def test_the_contract_holds_under_every_scaling_rule(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


@pytest.mark.parametrize("name", package_methods())
def test_every_method_has_a_page_and_tests_of_its_own(name: str) -> None:
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
    assert (ROOT / "tests" / "aggregators" / f"test_{name}.py").is_file()


@every_case
def test_round_one_starts_from_a_zero_b_and_the_initial_rows_at_every_rank(case: Case) -> None:
    adapter, state = initial_adapter(case.scaling), case.start()
    for plan in case.plans():
        broadcast = case.aggregator.broadcast(state, plan)
        for module, factors in broadcast.trainable.items():
            assert not factors.B.any()
            if broadcast.known_A is None:  # The contract compares the rows that are known.
                assert torch.equal(factors.A, adapter[module].A[: plan[module]])


@pytest.mark.parametrize("case", [case for case in DEFAULTS if case.traits.needs_one_rank], ids=words)
def test_a_client_that_lacks_modules_is_refused_by_name_where_all_need_one_rank(case: Case) -> None:
    state = case.after_a_round()
    full = case.updates(state, seed=1)
    partial = replace(full[1], client_id="partial", payload={"mlp.down_proj": full[1].payload["mlp.down_proj"]})
    with pytest.raises(AggregationError, match=r"'attn\.k_proj'.*'partial' has 0"):
        case.aggregator.aggregate(state, [*full, partial])
    with pytest.raises(AggregationError, match="has 0"):
        case.aggregator.broadcast(state, {"mlp.down_proj": SERVER_RANK})


@pytest.mark.parametrize("name", ["flexlora", "zero_pad"])
def test_a_module_that_a_client_lacks_counts_as_unchanged(name: str) -> None:
    case = Case(AGGREGATORS[name], {})
    state = case.after_a_round()
    full = case.updates(state, seed=1)
    partial = Update("partial", {"mlp.down_proj": full[1].payload["mlp.down_proj"]}, weight=100.0)
    # Its weight of one half counts in the modules it lacks: what only others brought shrinks.
    without = case.deltas(case.aggregator.aggregate(state, full))["attn.q_proj"]
    shrunk = case.deltas(case.aggregator.aggregate(state, [*full, partial]))["attn.q_proj"]
    assert np.linalg.norm(shrunk) < 0.6 * np.linalg.norm(without)


@every_case
def test_spectra_are_empty_before_round_one(case: Case) -> None:
    initial = case.aggregator.spectra(case.start())
    assert [(module, len(spectrum.S), spectrum.tail) for module, spectrum in initial.items()] == [
        (module, 0, 0.0) for module in sorted(SHAPES)
    ]


@every_case
def test_a_round_without_usable_weights_or_with_strange_modules_is_refused(case: Case) -> None:
    aggregator, state = case.aggregator, case.start()
    payload = aggregator.broadcast(state, all_modules(SERVER_RANK)).trainable
    with pytest.raises(AggregationError, match=r"add up to more than 0; got 0\.0"):
        aggregator.aggregate(state, iter([]))
    with pytest.raises(AggregationError, match="add up to more than 0"):
        aggregator.aggregate(state, [Update("a", payload, 0.0)])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(FlexLoraError, match=f"got {weight} from 'a'"):
            aggregator.aggregate(state, [Update("a", payload, weight)])
    with pytest.raises(ValueError, match=r"'other\.proj' from 'a'"):
        aggregator.aggregate(state, [Update("a", {**payload, "other.proj": payload["mlp.down_proj"]}, 1.0)])
