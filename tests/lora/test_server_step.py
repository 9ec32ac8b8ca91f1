"""Expected values come from dense float64 recursions in numpy and from numpy.linalg.svd."""

import numpy as np
import pytest
import torch

from flexlora.lora.factors import LoraFactors
from flexlora.lora.product import ProductSum, Spectrum, add_product, certified_decompositions
from flexlora.lora.server_step import ServerOptimizer, server_step

SHAPES = {"down": (20, 33), "up": (33, 20)}
RANKS = {"down": 4, "up": 6}
NOTHING = {
    module: Spectrum(torch.zeros(out, 0).double(), torch.zeros(0).double(), torch.zeros(0, into).double())
    for module, (out, into) in SHAPES.items()
}


def drawn(module: str, rank: int, seed: int) -> LoraFactors:
    rng, (out, into) = torch.Generator().manual_seed(seed), SHAPES[module]
    return LoraFactors(torch.randn(rank, into, generator=rng), torch.randn(out, rank, generator=rng), 0.5)


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


def cut(W: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def value(spectrum: Spectrum) -> np.ndarray:
    return (spectrum.U.numpy() * spectrum.S.numpy()) @ spectrum.Vh.numpy()


@pytest.mark.parametrize("eta", [1.0, 0.3, 1.5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("room", [1, 10])
def test_steps_follow_the_dense_recursion_cut_to_its_ranks(eta: float, beta: float, room: int) -> None:
    optimizer, ranks = ServerOptimizer(eta, beta), {module: room * rank for module, rank in RANKS.items()}
    current, momentum = NOTHING, None
    G = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    M = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for server_round in range(4):
        goals = {module: drawn(module, 5, 7 * server_round) for module in SHAPES}
        sums = {module: add_product(ProductSum(*SHAPES[module]), goals[module], 30.0) for module in SHAPES}
        current, momentum = server_step(optimizer, current, momentum, sums, 30.0, ranks)
        for module in SHAPES:
            moved = beta * M[module] + dense(goals[module]) - G[module]
            reached = G[module] + eta * moved
            G[module], M[module] = cut(reached, ranks[module]), cut(moved, 2 * ranks[module])
            norm = np.linalg.norm(reached)
            np.testing.assert_allclose(value(current[module]), G[module], atol=1e-9 * norm)
            assert current[module].tail == pytest.approx(np.linalg.norm(reached - G[module]), abs=1e-9 * norm)
            if beta:
                assert momentum is not None
                np.testing.assert_allclose(value(momentum[module]), M[module], atol=1e-9 * norm)
                lost = np.linalg.norm(moved - M[module])
                assert momentum[module].tail == pytest.approx(lost, abs=1e-9 * norm)
            else:
                assert momentum is None


def test_momentum_comes_to_rest_and_reaches_a_goal_that_stays() -> None:
    goals = {module: drawn(module, 3, 1) for module in SHAPES}
    current, momentum = NOTHING, None
    for _ in range(60):
        sums = {module: add_product(ProductSum(*SHAPES[module]), goals[module], 1.0) for module in SHAPES}
        current, momentum = server_step(ServerOptimizer(0.5, 0.5), current, momentum, sums, 1.0, RANKS)
    assert momentum is not None
    for module, goal in goals.items():
        norm = np.linalg.norm(dense(goal))
        np.testing.assert_allclose(value(current[module]), dense(goal), atol=1e-6 * norm)
        assert np.linalg.norm(value(momentum[module])) < 1e-6 * norm


def test_the_whole_way_without_momentum_is_the_decomposed_sum_to_the_bit() -> None:
    sums = {module: ProductSum(*shape) for module, shape in SHAPES.items()}
    for seed in range(3):
        sums = {module: add_product(own, drawn(module, 5, seed), 2.0 + seed) for module, own in sums.items()}
    found, momentum = server_step(ServerOptimizer(), NOTHING, None, sums, 9.0, RANKS)
    expected = certified_decompositions(list(sums.values()), list(RANKS.values()), 9.0)
    assert momentum is None
    for own, (plain, _) in zip(found.values(), expected, strict=True):
        assert all(torch.equal(getattr(own, part), getattr(plain, part)) for part in ("U", "S", "Vh"))
        assert own.tail == plain.tail
