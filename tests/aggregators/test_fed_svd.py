"""Expected values come from numpy: the mean of B times the common A, numpy.linalg.svd, and the coverage law."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.fed_svd import FedSvd, FedSvdState
from flexlora.federation.messages import Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.q_proj": (12, 12), "mlp.down_proj": (10, 17), "mlp.up_proj": (17, 10)}
SCALING = Scaling("constant_alpha", 16.0)
SERVER_RANK = 5
COHORT = [(1, 4.0), (3, 3.0), (5, 1.0)]


def initial() -> AdapterState:
    rng = torch.Generator().manual_seed(0)
    return {
        module: LoraFactors(
            torch.rand(SERVER_RANK, shape[1], generator=rng) - 0.5,
            torch.zeros(shape[0], SERVER_RANK),
            SCALING(SERVER_RANK),
        )
        for module, shape in SHAPES.items()
    }


def trained(aggregator: FedSvd, state: FedSvdState, rank: int, weight: float, seed: int) -> Update:
    """Return the update of a client that has changed its B and left A alone."""
    sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, rank))
    assert sent.train_factors == "B" and sent.frozen is None
    rng = torch.Generator().manual_seed(seed)
    payload = {
        module: LoraFactors(f.A, f.B + 0.3 * torch.randn(f.B.shape, generator=rng), f.scaling)
        for module, f in sent.trainable.items()
    }
    return Update(str(seed), payload, weight)


def mean_b_times_a(updates: list[Update], module: str) -> np.ndarray:
    """Return the mean of the scaled B, padded to the largest rank, times the A of the largest client."""
    total = sum(update.weight for update in updates)
    largest = max((u.payload[module] for u in updates), key=lambda f: f.rank)
    B = np.zeros((SHAPES[module][0], largest.rank))
    for update in updates:
        f = update.payload[module]
        B[:, : f.rank] += update.weight / total * f.scaling * f.B.double().numpy()
    return B @ largest.A.double().numpy()


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


@pytest.mark.parametrize("ranks", [(SERVER_RANK, SERVER_RANK, SERVER_RANK), (1, 3, 5)], ids=str)
def test_the_mean_of_b_times_the_common_a_is_decomposed(ranks: tuple[int, ...]):
    aggregator = FedSvd(scaling=SCALING)
    state = aggregator.init(initial())
    for server_round in range(3):
        updates = [trained(aggregator, state, r, 1.0 + i, 10 * server_round + i) for i, r in enumerate(ranks)]
        state = aggregator.aggregate(state, updates)
        for module in SHAPES:
            U, S, Vh = np.linalg.svd(mean_b_times_a(updates, module))
            spectrum = aggregator.spectra(state)[module]
            # Clients hold A in float32, so that of a small one is that of a large one to 1e-7 only.
            np.testing.assert_allclose(spectrum.S.numpy(), S[:SERVER_RANK], rtol=1e-5)
            assert spectrum.tail < 1e-5 * S[0]
            for rank in (1, 3, SERVER_RANK):
                f = aggregator.broadcast(state, {module: rank}).trainable[module]
                np.testing.assert_allclose((f.A @ f.A.T).numpy(), np.eye(rank), atol=1e-5)
                np.testing.assert_allclose(f.B.norm(dim=0).numpy(), S[:rank] / SCALING(rank), rtol=1e-4)
                expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
                assert np.linalg.norm(dense(f) - expected) < 1e-4 * np.linalg.norm(expected)


def test_echoes_change_nothing_at_one_rank_and_decay_by_their_coverage_at_mixed_ranks():
    aggregator = FedSvd(scaling=SCALING)
    state = aggregator.init(initial())
    state = aggregator.aggregate(state, [trained(aggregator, state, SERVER_RANK, 1.0, seed) for seed in range(2)])
    for ranks, coverage in (((5, 5, 5), [1, 1, 1, 1, 1]), ((1, 3, 5), [1, 0.5, 0.5, 0.125, 0.125])):
        echoes = [
            Update(str(i), aggregator.broadcast(state, dict.fromkeys(SHAPES, rank)).trainable, weight)
            for i, (rank, (_, weight)) in enumerate(zip(ranks, COHORT, strict=True))
        ]
        after = aggregator.aggregate(state, echoes)
        for module, old in aggregator.spectra(state).items():
            expected = ((old.U * old.S) @ (torch.tensor(coverage, dtype=torch.float64)[:, None] * old.Vh)).numpy()
            found = aggregator.spectra(after)[module].delta().numpy()
            assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(expected)


def test_a_stays_within_the_span_of_the_initial_rows():
    aggregator = FedSvd(scaling=SCALING)
    state = aggregator.init(initial())
    for server_round in range(4):
        updates = [trained(aggregator, state, SERVER_RANK, 1.0, 10 * server_round + i) for i in range(3)]
        state = aggregator.aggregate(state, updates)
    for module, factors in aggregator.broadcast(state, dict.fromkeys(SHAPES, SERVER_RANK)).trainable.items():
        basis = np.linalg.qr(initial()[module].A.double().numpy().T)[0]
        A = factors.A.double().numpy()
        assert np.linalg.norm(A - A @ basis @ basis.T) < 1e-5 * np.linalg.norm(A)


def test_modules_that_a_client_lacks_are_zero_products_and_ranks_above_the_aggregates_can_learn():
    aggregator = FedSvd(scaling=SCALING)
    state = aggregator.init(initial())
    one, two = (trained(aggregator, state, 2, 1.0, seed) for seed in (1, 2))
    without = Update("without", {"attn.q_proj": two.payload["attn.q_proj"]}, 3.0)
    state = aggregator.aggregate(state, [one, without])
    found = aggregator.spectra(state)["mlp.down_proj"].delta().numpy()
    np.testing.assert_allclose(found, dense(one.payload["mlp.down_proj"]) / 4, rtol=0, atol=1e-10)
    for rank in (4, SERVER_RANK, SERVER_RANK + 2):
        factors = aggregator.broadcast(state, {"mlp.down_proj": rank}).trainable["mlp.down_proj"]
        assert factors.rank == rank and factors.A.any(dim=1).all() and not factors.B[:, 2:].any()


def test_one_client_is_a_fixed_point_and_what_it_trains_is_b_alone():
    aggregator = FedSvd(scaling=SCALING)
    state = aggregator.init(initial())
    only = trained(aggregator, state, 3, 7.0, 1)
    sent = aggregator.broadcast(aggregator.aggregate(state, [only]), dict.fromkeys(SHAPES, 3))
    for module, (out_features, in_features) in SHAPES.items():
        expected = dense(only.payload[module])
        assert np.linalg.norm(dense(sent.trainable[module]) - expected) < 1e-5 * np.linalg.norm(expected)
        # Down r (out + in), up r out: B alone is trained, and what is not trained does not travel back.
        assert sent.trainable[module].A.numel() + sent.trainable[module].B.numel() == 3 * (out_features + in_features)
        assert only.payload[module].B.numel() == 3 * out_features
