"""Every method of the package keeps the contract, and says in its own words what it refuses."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract import CHECKS
from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, SHAPES, Case, all_modules, initial_adapter
from flexlora.aggregators.registry import AGGREGATORS, package_methods
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Update
from flexlora.testing import its_checkpoints_come_back

DEFAULTS = [Case(AGGREGATORS[name], {}, scaling) for name in package_methods() for scaling in SCALINGS]
# Each with unequal alpha / r: what options change has nothing to do with the rule that scalings follow.
VARIANTS = [
    Case(AGGREGATORS[name], options)
    for name, options in (
        ("flexlora", {"error_compensation": True}),
        ("flexlora", {"fold_tail": True}),
        ("flexlora", {"error_compensation": True, "fold_tail": True}),
        ("flexlora", {"split": "balanced"}),
        ("flexlora", {"server_rank": 7}),
        ("flexlora", {"server_rank": 5}),
        ("flexlora", {"server_learning_rate": 0.5}),
        ("flexlora", {"server_momentum": 0.5, "error_compensation": True}),
    )
]
CASES = [*DEFAULTS, *VARIANTS]


def words(case: Case) -> str:
    return "-".join(
        [case.method.__name__, *(f"{name}={value}" for name, value in case.options.items()), case.scaling.policy]
    )


every_case = pytest.mark.parametrize("case", CASES, ids=words)
first_scaling = pytest.mark.parametrize("case", [*DEFAULTS[:: len(SCALINGS)], *VARIANTS], ids=words)


@every_case
@pytest.mark.parametrize("check", [*CHECKS, its_checkpoints_come_back], ids=lambda check: check.__name__)
def test_the_contract_holds(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


@every_case
def test_round_one_starts_from_the_initial_rows_and_a_zero_b_at_every_rank(case: Case) -> None:
    adapter, state = initial_adapter(case.scaling), case.start()
    for plan in case.plans():
        for module, factors in case.aggregator.broadcast(state, plan).trainable.items():
            assert torch.equal(factors.A, adapter[module].A[: plan[module]])
            assert not factors.B.any()


@first_scaling
def test_a_client_that_lacks_modules_is_refused_by_name_or_counts_as_unchanged(case: Case) -> None:
    state = case.after_a_round()
    full = case.updates(state, seed=1)
    partial = Update("partial", {"mlp.down_proj": full[1].payload["mlp.down_proj"]}, weight=100.0)
    if case.traits.needs_one_rank:
        with pytest.raises(AggregationError, match=r"'attn\.k_proj'.*'partial' has 0"):
            case.aggregator.aggregate(state, [*full, partial])
        with pytest.raises(AggregationError, match="has 0"):
            case.aggregator.broadcast(state, {"mlp.down_proj": SERVER_RANK})
    elif not case.options.get("error_compensation") and not case.traits.server_optimizer:
        # Its weight of one half counts in the modules it lacks: what only others brought shrinks.
        module = "attn.q_proj"
        without = case.deltas(case.aggregator.aggregate(state, full))[module]
        shrunk = case.deltas(case.aggregator.aggregate(state, [*full, partial]))[module]
        assert np.linalg.norm(shrunk) < 0.6 * np.linalg.norm(without)


@first_scaling
def test_spectra_are_empty_before_round_one(case: Case) -> None:
    initial = case.aggregator.spectra(case.start())
    assert [(module, len(spectrum.S), spectrum.tail) for module, spectrum in initial.items()] == [
        (module, 0, 0.0) for module in sorted(SHAPES)
    ]


@first_scaling
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
