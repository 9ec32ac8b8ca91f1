"""Expected values come from numpy: dense means of products, and directions averaged by hand over their holders."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, SHAPES, Case
from flexlora.aggregators.rolora import RoLora
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors

CASES = [Case(RoLora, {}, scaling) for scaling in SCALINGS]
every_scaling = pytest.mark.parametrize("case", CASES, ids=lambda case: case.scaling.policy)


def trained(sent: Broadcast, seed: int) -> AdapterState:
    """Return what was sent with noise on the factor that is to be trained."""
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            f.A + (sent.train_factors == "A") * torch.randn(f.A.shape, generator=rng),
            f.B + (sent.train_factors == "B") * torch.randn(f.B.shape, generator=rng),
            f.scaling,
        )
        for module, f in sent.trainable.items()
    }


def mean_of_products(updates: list[Update], module: str) -> np.ndarray:
    total = sum(update.weight for update in updates)
    parts = [(update.weight / total, update.payload[module]) for update in updates]
    return sum(
        (w * f.scaling * f.B.double().numpy() @ f.A.double().numpy() for w, f in parts), np.zeros(SHAPES[module])
    )


def test_b_is_trained_first_because_a_has_no_gradient_while_b_is_zero() -> None:
    case = CASES[0]
    state = case.start()
    for expected in ("B", "A", "B", "A"):
        for rank in (1, SERVER_RANK):
            assert case.aggregator.broadcast(state, case.all_modules(rank)).train_factors == expected
        state = case.aggregator.aggregate(state, case.updates(state))
    assert all(factors.B.any() for factors in state.adapter.values())


@every_scaling
@pytest.mark.parametrize("num_rounds", [0, 1, 2])
def test_every_round_is_exact_at_one_rank(case: Case, num_rounds: int) -> None:
    state = case.start()
    for server_round in range(num_rounds):
        state = case.aggregator.aggregate(state, case.updates(state, seed=server_round))
    sent = case.aggregator.broadcast(state, case.all_modules(SERVER_RANK))
    updates = [Update(str(i), trained(sent, seed=i), 1.0 + i) for i in range(4)]
    after = case.aggregator.aggregate(state, updates)
    for module, factors in after.adapter.items():
        W = mean_of_products(updates, module)
        # What was sent in float32 differs from the state that the mean is put beside by its rounding.
        np.testing.assert_allclose(factors.delta().numpy(), W, atol=2e-7 * np.linalg.norm(W))


@every_scaling
def test_the_trained_factor_is_averaged_over_its_holders_and_the_other_stays(case: Case) -> None:
    state = case.start()
    for trains in ("B", "A"):
        updates = case.updates(state, seed=7)
        after = case.aggregator.aggregate(state, updates)
        for module, found in after.adapter.items():
            kept, before = ("A", "B") if trains == "B" else ("B", "A"), state.adapter[module]
            assert torch.equal(getattr(found, kept[0]), getattr(before, kept[0]))
            for j in range(SERVER_RANK):
                held = [(u.payload[module], u.weight) for u in updates if u.payload[module].rank > j]
                rows = [f.A[j] if trains == "A" else f.scaling * f.B[:, j] for f, _ in held]
                mean = np.average([row.double().numpy() for row in rows], axis=0, weights=[w for _, w in held])
                row = found.A[j] if trains == "A" else found.B[:, j]
                np.testing.assert_allclose(row.numpy(), mean, rtol=1e-6, atol=1e-7)
        state = after


def test_echoes_of_mixed_ranks_change_nothing_in_either_kind_of_round() -> None:
    case = CASES[0]
    state = case.after_a_round()
    before = state.adapter
    for _ in range(2):
        echoes = [
            Update(str(i), case.aggregator.broadcast(state, plan).trainable, 1.0 + i)
            for i, plan in enumerate(case.plans())
        ]
        state = case.aggregator.aggregate(state, echoes)
        for module, factors in before.items():
            torch.testing.assert_close(state.adapter[module].A, factors.A, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(state.adapter[module].B, factors.B, rtol=1e-6, atol=1e-6)


def test_a_client_that_lacks_a_module_has_no_say_in_it() -> None:
    case = CASES[0]
    state = case.after_a_round()
    full = case.updates(state, seed=1)
    partial = Update("partial", {"mlp.down_proj": full[1].payload["mlp.down_proj"]}, weight=100.0)
    without, found = (case.aggregator.aggregate(state, updates).adapter for updates in (full, [*full, partial]))
    assert torch.equal(found["attn.q_proj"].A, without["attn.q_proj"].A)
    assert not torch.equal(found["mlp.down_proj"].A, without["mlp.down_proj"].A)
