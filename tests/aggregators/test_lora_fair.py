"""Expected values come from numpy and scipy: padded means, the dense mean of products, and a dense solve."""

import numpy as np
import pytest
import torch
from scipy import linalg

from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, SHAPES, Case
from flexlora.aggregators.lora_fair import LoraFair
from flexlora.aggregators.zero_pad import ZeroPad
from flexlora.federation.messages import Update
from flexlora.lora.factors import LoraFactors

every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.policy)


def dense_parts(updates: list[Update], module: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the padded means of ``A`` and of ``s B``, and the mean of the products."""
    out_features, in_features = SHAPES[module]
    A, B, W = np.zeros((SERVER_RANK, in_features)), np.zeros((out_features, SERVER_RANK)), np.zeros(SHAPES[module])
    total = sum(update.weight for update in updates)
    for update in updates:
        if module in update.payload:
            f, w = update.payload[module], update.weight / total
            Ai, Bi = f.A.double().numpy(), f.scaling * f.B.double().numpy()
            A[: f.rank] += w * Ai
            B[:, : f.rank] += w * Bi
            W += w * Bi @ Ai
    return A, B, W


@every_scaling
@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_b_is_corrected_as_the_dense_solve_says_at_mixed_ranks_and_with_missing_modules(scaling, ridge: float) -> None:
    case = Case(LoraFair, {"ridge": ridge}, scaling)
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    updates.append(Update("partial", {"mlp.down_proj": updates[1].payload["mlp.down_proj"]}, weight=25.0))
    after = case.aggregator.aggregate(state, updates)
    for module, found in after.adapter.items():
        A, B, W = dense_parts(updates, module)
        dB = linalg.solve(A @ A.T + ridge * np.eye(SERVER_RANK), A @ (W - B @ A).T, assume_a="pos").T
        np.testing.assert_allclose(found.A.numpy(), A, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(found.B.numpy(), B + dB, rtol=1e-8, atol=1e-9 * np.abs(B + dB).max())


@every_scaling
def test_the_bias_is_smaller_than_that_of_padding_and_none_is_left_in_the_rows_of_the_mean_a(scaling) -> None:
    case, plain = Case(LoraFair, {"ridge": 0.0}, scaling), Case(ZeroPad, {}, scaling)
    updates = case.updates(case.after_a_round(), seed=1)
    found = case.aggregator.aggregate(case.start(), updates).adapter
    padded = plain.aggregator.aggregate(plain.start(), updates).adapter
    for module in SHAPES:
        A, _, W = dense_parts(updates, module)
        bias = W - found[module].delta().numpy()
        assert np.linalg.norm(bias) < np.linalg.norm(W - padded[module].delta().numpy())
        np.testing.assert_allclose(bias @ A.T, 0, atol=1e-9 * np.linalg.norm(W))


def test_clients_that_share_one_a_are_averaged_exactly() -> None:
    case = Case(LoraFair, {"ridge": 0.0}, SCALINGS[0])
    state = case.start()
    updates: list[Update] = []
    for i, plan in enumerate(case.plans()):
        payload: dict[str, LoraFactors] = {}
        for module, factors in case.aggregator.broadcast(state, plan).trainable.items():
            noise = torch.randn(factors.B.shape, generator=torch.Generator().manual_seed(i))
            payload[module] = LoraFactors(factors.A, noise, factors.scaling)
        updates.append(Update(str(i), payload, 1.0 + i))
    after = case.aggregator.aggregate(state, updates)
    for module, found in after.adapter.items():
        W = dense_parts(updates, module)[2]
        np.testing.assert_allclose(found.delta().numpy(), W, atol=1e-6 * np.linalg.norm(W))


def test_an_echo_decays_each_direction_by_its_coverage_once_and_not_twice() -> None:
    case = Case(LoraFair, {"ridge": 0.0}, SCALINGS[0])
    state = case.after_a_round()
    cohort = [(2, 1.0), (4, 2.0), (5, 1.0)]
    echoes = [Update(str(r), case.aggregator.broadcast(state, case.all_modules(r)).trainable, w) for r, w in cohort]
    after = case.aggregator.aggregate(state, echoes)
    coverage = torch.tensor([1, 1, 0.75, 0.75, 0.25], dtype=torch.float64)
    for module, before in state.adapter.items():
        torch.testing.assert_close(after.adapter[module].A, coverage[:, None] * before.A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after.adapter[module].B, before.B, rtol=1e-4, atol=1e-4)


def test_what_nobody_covers_is_kept_as_it_was() -> None:
    case = Case(LoraFair, {}, SCALINGS[0])
    state = case.after_a_round()
    only = {"mlp.down_proj": case.updates(state, seed=1)[0].payload["mlp.down_proj"]}
    after = case.aggregator.aggregate(state, [Update("small", only, 2.0)]).adapter
    assert torch.equal(after["attn.q_proj"].A, state.adapter["attn.q_proj"].A)
    assert torch.equal(after["attn.q_proj"].B, state.adapter["attn.q_proj"].B)
    assert torch.equal(after["mlp.down_proj"].B[:, 2:], state.adapter["mlp.down_proj"].B[:, 2:])


def test_both_factors_travel() -> None:
    case = Case(LoraFair, {}, SCALINGS[0])
    sent = case.aggregator.broadcast(case.start(), case.all_modules(2))
    assert (sent.train_factors, sent.kept, sent.known_A, sent.frozen) == ("both", None, None, None)
