"""Expected values come from numpy: means of factors, means of products and numpy.linalg.svd in float64."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.fedex_lora import FedExLora
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.q_proj": (12, 12), "mlp.down_proj": (10, 17), "mlp.up_proj": (17, 10)}
SCALING = Scaling("constant_alpha", 16.0)
RANK = 3


def adapter(seed: int, rank: int = RANK) -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, shape[1], generator=rng), torch.randn(shape[0], rank, generator=rng), SCALING(rank)
        )
        for module, shape in SHAPES.items()
    }


def initial() -> AdapterState:
    return {m: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for m, f in adapter(99).items()}


def cohort(seed: int, weights: tuple[float, ...] = (1.0, 3.0, 4.0)) -> list[Update]:
    return [Update(str(i), adapter(10 * seed + i), weight) for i, weight in enumerate(weights)]


def mean(updates: list[Update], module: str, part: str, *, uniform: bool = False) -> np.ndarray:
    """Return the mean of A, of B, or of the scaled products P."""
    total = sum(1.0 if uniform else update.weight for update in updates)
    found = 0.0
    for update in updates:
        f = update.payload[module]
        A, B = f.A.double().numpy(), f.B.double().numpy()
        found = found + (1.0 if uniform else update.weight) / total * {"A": A, "B": B, "P": f.scaling * B @ A}[part]
    return np.asarray(found)


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


def whole(sent: Broadcast, module: str) -> np.ndarray:
    return dense(sent.trainable[module]) + dense((sent.frozen or {})[module])


@pytest.mark.parametrize("uniform", [False, True])
def test_trained_and_frozen_part_are_the_old_frozen_part_and_the_exact_mean_of_products(uniform: bool):
    aggregator = FedExLora(scaling=SCALING, uniform_weights=uniform)
    state, frozen = aggregator.init(initial()), {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for server_round in range(4):
        updates = cohort(server_round)
        state = aggregator.aggregate(state, updates)
        sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, RANK))
        for module in SHAPES:
            A, B, P = (mean(updates, module, part, uniform=uniform) for part in "ABP")
            np.testing.assert_allclose(state.adapter[module].A.numpy(), A, rtol=0, atol=1e-14)
            np.testing.assert_allclose(state.adapter[module].B.numpy(), B, rtol=0, atol=1e-14)
            found = dense(state.adapter[module]) + state.residual[module].delta().numpy()
            np.testing.assert_allclose(found, frozen[module] + P, rtol=0, atol=1e-11)
            np.testing.assert_allclose(aggregator.spectra(state)[module].delta().numpy(), found, rtol=0, atol=1e-11)
            assert np.linalg.norm(whole(sent, module) - found) < 1e-6 * np.linalg.norm(found)
            frozen[module] += P - SCALING(RANK) * B @ A
            np.testing.assert_allclose(state.residual[module].delta().numpy(), frozen[module], rtol=0, atol=1e-11)


def test_the_residual_is_the_covariance_of_the_factors_and_not_transposed():
    updates = cohort(0)
    aggregator = FedExLora(scaling=SCALING)
    state = aggregator.aggregate(aggregator.init(initial()), updates)
    for module, shape in SHAPES.items():
        A, B, expected = mean(updates, module, "A"), mean(updates, module, "B"), np.zeros(shape)
        for update in updates:
            f = update.payload[module]
            expected += update.weight / 8 * f.scaling * (f.B.double().numpy() - B) @ (f.A.double().numpy() - A)
        np.testing.assert_allclose(state.residual[module].delta().numpy(), expected, rtol=0, atol=1e-11)


def test_uniform_weights_count_clients_and_leave_out_those_without_examples():
    aggregator = FedExLora(scaling=SCALING, uniform_weights=True)
    updates = cohort(0)
    ghost = Update("ghost", adapter(50), 0.0)
    first, second = (aggregator.aggregate(aggregator.init(initial()), one) for one in (updates, [*updates, ghost]))
    for module in SHAPES:
        assert torch.equal(first.adapter[module].B, second.adapter[module].B)
        np.testing.assert_allclose(
            first.residual[module].delta().numpy(), second.residual[module].delta().numpy(), rtol=0, atol=1e-11
        )


@pytest.mark.parametrize("rank", [1, 4])
def test_a_residual_rank_keeps_the_best_approximation_of_each_rounds_residual(rank: int):
    aggregator = FedExLora(scaling=SCALING, residual_rank=rank)
    state, frozen = aggregator.init(initial()), {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for server_round in range(3):
        updates = cohort(server_round)
        state = aggregator.aggregate(state, updates)
        for module in SHAPES:
            residual = mean(updates, module, "P") - SCALING(RANK) * mean(updates, module, "B") @ mean(
                updates, module, "A"
            )
            U, S, Vh = np.linalg.svd(residual)
            frozen[module] += (U[:, :rank] * S[:rank]) @ Vh[:rank]
            np.testing.assert_allclose(state.residual[module].delta().numpy(), frozen[module], rtol=0, atol=1e-10)
            assert aggregator.spectra(state)[module].tail == pytest.approx(np.linalg.norm(S[rank:]), rel=1e-9)


def test_clients_that_agree_leave_no_residual_and_echoes_change_nothing():
    aggregator = FedExLora(scaling=SCALING)
    state = aggregator.aggregate(aggregator.init(initial()), [Update(str(i), adapter(5), 1.0 + i) for i in range(3)])
    assert aggregator.broadcast(state, dict.fromkeys(SHAPES, RANK)).frozen is None
    state = aggregator.aggregate(state, cohort(1))
    sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, RANK))
    echoed = aggregator.aggregate(state, [Update(str(i), sent.trainable, 1.0 + i) for i in range(3)])
    again = aggregator.broadcast(echoed, dict.fromkeys(SHAPES, RANK))
    for module in SHAPES:
        assert torch.equal(again.trainable[module].A, sent.trainable[module].A)
        W = whole(sent, module)
        assert np.linalg.norm(whole(again, module) - W) < 1e-6 * np.linalg.norm(W)


def test_the_whole_model_does_not_depend_on_the_gauge_though_the_factors_do():
    aggregator, rng, updates = FedExLora(scaling=SCALING), np.random.default_rng(0), cohort(0)

    def turned(factors: LoraFactors) -> LoraFactors:
        M = torch.tensor(rng.standard_normal((factors.rank, factors.rank)) + 3 * np.eye(factors.rank))
        return LoraFactors(torch.linalg.solve(M, factors.A.double()), factors.B.double() @ M, factors.scaling)

    others = [Update(u.client_id, {m: turned(f) for m, f in u.payload.items()}, u.weight) for u in updates]
    first, second = (aggregator.aggregate(aggregator.init(initial()), one) for one in (updates, others))
    for module in SHAPES:
        W = aggregator.spectra(first)[module].delta()
        assert (aggregator.spectra(second)[module].delta() - W).norm() < 1e-11 * W.norm()
        assert (second.adapter[module].delta() - first.adapter[module].delta()).norm() > 0.1 * W.norm()


def test_what_is_sent_is_the_factors_and_all_residuals_so_far():
    aggregator = FedExLora(scaling=SCALING)
    state = aggregator.init(initial())
    for server_round in range(3):
        sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, RANK))
        for module, (out_features, in_features) in SHAPES.items():
            f = sent.trainable[module]
            assert f.A.numel() + f.B.numel() == RANK * (out_features + in_features)
            # The paper sends the residual of one round, of rank at most (n - 1) r = 3, and clients remember the rest.
            branch = (sent.frozen or {}).get(module)
            found = 0 if branch is None else branch.A.numel() + branch.B.numel()
            assert found == min(3 * server_round, out_features, in_features) * (out_features + in_features)
        state = aggregator.aggregate(state, cohort(server_round, (1.0, 2.0)))


def test_other_ranks_and_missing_modules_are_refused():
    aggregator = FedExLora(scaling=SCALING)
    state = aggregator.init(initial())
    with pytest.raises(AggregationError, match=r"3 in 'attn\.q_proj'; client 'large' has 4"):
        aggregator.aggregate(state, [Update("large", adapter(0, rank=4), 1.0)])
    with pytest.raises(AggregationError, match="client 'partial' has 0"):
        aggregator.aggregate(state, [Update("partial", {"attn.q_proj": adapter(0)["attn.q_proj"]}, 1.0)])
    with pytest.raises(AggregationError, match="the receiving client has 2"):
        aggregator.broadcast(state, dict.fromkeys(SHAPES, 2))
