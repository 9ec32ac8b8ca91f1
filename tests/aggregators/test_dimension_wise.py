"""Expected values come from numpy: every direction averaged by hand over the clients that hold it."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract_case import SCALINGS, Case
from flexlora.aggregators.dimension_wise import DimensionWise
from flexlora.aggregators.fedit import FedIt
from flexlora.federation.messages import Update

CASES = [Case(DimensionWise, {}, scaling) for scaling in SCALINGS]
every_scaling = pytest.mark.parametrize("case", CASES, ids=lambda case: case.scaling.policy)


@every_scaling
def test_each_direction_is_the_mean_of_its_holders_with_b_in_the_scaling_of_its_client(case: Case) -> None:
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    after = case.aggregator.aggregate(state, updates)
    for module, found in after.adapter.items():
        for j in range(found.rank):
            held = [(u.payload[module], u.weight) for u in updates if u.payload[module].rank > j]
            weights = [weight for _, weight in held]
            A = np.average([f.A[j].double().numpy() for f, _ in held], axis=0, weights=weights)
            B = np.average([f.scaling * f.B[:, j].double().numpy() for f, _ in held], axis=0, weights=weights)
            np.testing.assert_allclose(found.A[j].numpy(), A, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(found.B[:, j].numpy(), B, rtol=1e-12, atol=1e-13)


@every_scaling
def test_echoes_of_mixed_ranks_change_nothing(case: Case) -> None:
    state = case.after_a_round()
    echoes = [
        Update(str(i), case.aggregator.broadcast(state, plan).trainable, 1.0 + i) for i, plan in enumerate(case.plans())
    ]
    after = case.aggregator.aggregate(state, echoes)
    for module, factors in state.adapter.items():
        torch.testing.assert_close(after.adapter[module].A, factors.A, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(after.adapter[module].B, factors.B, rtol=1e-6, atol=1e-6)


def test_at_one_rank_it_is_fedit() -> None:
    case, reference = CASES[0], Case(FedIt, {}, SCALINGS[0])
    updates = reference.updates(reference.start())
    expected = reference.deltas(reference.aggregator.aggregate(reference.start(), updates))
    found = case.deltas(case.aggregator.aggregate(case.start(), updates))
    for module, delta in expected.items():
        np.testing.assert_allclose(found[module], delta, rtol=1e-5, atol=1e-5 * np.abs(delta).max())


def test_what_it_misses_of_the_mean_of_products_is_the_covariance_of_the_factors() -> None:
    case = CASES[0]
    state = case.after_a_round()
    updates = [
        Update(str(i), case.updates(state, seed=i)[2].payload, 1.0 + i)  # the third client has every direction
        for i in range(3)
    ]
    after = case.aggregator.aggregate(state, updates)
    for module, mean in after.adapter.items():
        A, B, w = mean.A.numpy(), mean.B.numpy(), np.array([1.0, 2.0, 3.0]) / 6
        parts = [
            (u.payload[module].scaling * u.payload[module].B.double().numpy(), u.payload[module].A.double().numpy())
            for u in updates
        ]
        products = sum(wi * Bi @ Ai for wi, (Bi, Ai) in zip(w, parts, strict=True))
        covariance = sum(wi * (Bi - B) @ (Ai - A) for wi, (Bi, Ai) in zip(w, parts, strict=True))
        np.testing.assert_allclose(products - B @ A, covariance, rtol=1e-9, atol=1e-10)
        assert np.linalg.norm(covariance) > 0.01 * np.linalg.norm(products)


def test_a_client_that_lacks_a_module_has_no_say_in_it() -> None:
    case = CASES[0]
    state = case.after_a_round()
    full = case.updates(state, seed=1)
    partial = Update("partial", {"mlp.down_proj": full[1].payload["mlp.down_proj"]}, weight=100.0)
    without, found = (case.aggregator.aggregate(state, updates).adapter for updates in (full, [*full, partial]))
    for module in ("attn.k_proj", "attn.q_proj"):
        assert torch.equal(found[module].A, without[module].A) and torch.equal(found[module].B, without[module].B)
    assert not torch.equal(found["mlp.down_proj"].A, without["mlp.down_proj"].A)


def test_both_factors_travel_at_the_ranks_of_the_client() -> None:
    sent = CASES[0].broadcast(CASES[0].start(), CASES[0].all_modules(2))
    assert (sent.train_factors, sent.kept, sent.known_A, sent.frozen) == ("both", None, None, None)


def test_ranks_above_the_servers_are_refused() -> None:
    case = CASES[0]
    state = case.start()
    with pytest.raises(AggregationError, match=r"1\.\.5, the rank of the server's adapter in 'attn\.k_proj'; got 6"):
        case.aggregator.broadcast(state, case.all_modules(6))
