"""Expected values come from numpy: dense means of products over the A that was sent."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, SHAPES, Case, initial_adapter
from flexlora.aggregators.ffa_lora import FfaLora
from flexlora.federation.known_rows import known_rows
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors

CASES = [Case(FfaLora, {}, scaling) for scaling in SCALINGS]
every_scaling = pytest.mark.parametrize("case", CASES, ids=lambda case: case.scaling.policy)


def trained_b(sent: Broadcast, seed: int) -> AdapterState:
    """Return what was sent with noise on every ``B``."""
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(f.A, f.B + torch.randn(f.B.shape, generator=rng), f.scaling)
        for module, f in sent.trainable.items()
    }


def mean_of_products(updates: list[Update], module: str) -> np.ndarray:
    total = sum(update.weight for update in updates)
    parts = [(update.weight / total, update.payload[module]) for update in updates]
    return sum(
        (w * f.scaling * f.B.double().numpy() @ f.A.double().numpy() for w, f in parts), np.zeros(SHAPES[module])
    )


@every_scaling
def test_at_one_rank_the_mean_is_that_of_the_products_exactly(case: Case) -> None:
    state = case.after_a_round()
    sent = case.aggregator.broadcast(state, case.all_modules(SERVER_RANK))
    updates = [Update(str(i), trained_b(sent, seed=i), 1.0 + i) for i in range(4)]
    after = case.aggregator.aggregate(state, updates)
    for module, factors in after.adapter.items():
        W = mean_of_products(updates, module)
        np.testing.assert_allclose(factors.delta().numpy(), W, rtol=1e-12, atol=1e-13 * np.abs(W).max())


@every_scaling
def test_at_mixed_ranks_each_direction_is_exact_over_its_holders(case: Case) -> None:
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    after = case.aggregator.aggregate(state, updates)
    for module, found in after.adapter.items():
        A = state.adapter[module].A.numpy()
        expected = np.zeros(SHAPES[module])
        for j in range(SERVER_RANK):
            held = [(u.payload[module], u.weight) for u in updates if u.payload[module].rank > j]
            columns = [f.scaling * f.B[:, j].double().numpy() for f, _ in held]
            expected += np.outer(np.average(columns, axis=0, weights=[w for _, w in held]), A[j])
        np.testing.assert_allclose(found.delta().numpy(), expected, rtol=1e-10, atol=1e-11 * np.abs(expected).max())


@every_scaling
def test_a_is_what_every_client_can_draw_and_never_changes(case: Case) -> None:
    state = case.start()
    for _ in range(2):
        for rank in range(1, SERVER_RANK + 1):
            sent = case.aggregator.broadcast(state, case.all_modules(rank))
            assert isinstance(sent.known_A, int) and sent.train_factors == "B"
            for module, factors in sent.trainable.items():
                assert torch.equal(factors.A, known_rows(sent.known_A, module, rank, SHAPES[module][1]))
        state = case.aggregator.aggregate(state, case.updates(state, seed=1))


def test_an_a_that_comes_back_changed_counts_for_nothing() -> None:
    case = CASES[0]
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    changed = [
        Update(u.client_id, {m: LoraFactors(f.A + 1, f.B, f.scaling) for m, f in u.payload.items()}, u.weight)
        for u in updates
    ]
    after, expected = (case.aggregator.aggregate(state, them).adapter for them in (changed, updates))
    for module, factors in expected.items():
        assert torch.equal(after[module].A, factors.A) and torch.equal(after[module].B, factors.B)


def test_the_seed_comes_from_the_initial_adapter() -> None:
    method, first = CASES[0].aggregator, initial_adapter()
    other = {module: LoraFactors(factors.A + 1, factors.B, factors.scaling) for module, factors in first.items()}
    assert method.init(first).seed == method.init(dict(reversed(first.items()))).seed
    assert method.init(first).seed != method.init(other).seed
    assert 0 <= method.init(first).seed < 2**63


def test_echoes_of_mixed_ranks_change_nothing() -> None:
    case = CASES[0]
    state = case.after_a_round()
    echoes = [
        Update(str(i), case.aggregator.broadcast(state, plan).trainable, 1.0 + i) for i, plan in enumerate(case.plans())
    ]
    after = case.aggregator.aggregate(state, echoes)
    for module, factors in state.adapter.items():
        torch.testing.assert_close(after.adapter[module].B, factors.B, rtol=1e-6, atol=1e-6)


def test_a_client_that_lacks_a_module_has_no_say_in_it() -> None:
    case = CASES[0]
    state = case.after_a_round()
    full = case.updates(state, seed=1)
    partial = Update("partial", {"mlp.down_proj": full[1].payload["mlp.down_proj"]}, weight=100.0)
    without, found = (case.aggregator.aggregate(state, updates).adapter for updates in (full, [*full, partial]))
    assert torch.equal(found["attn.q_proj"].B, without["attn.q_proj"].B)
    assert not torch.equal(found["mlp.down_proj"].B, without["mlp.down_proj"].B)
