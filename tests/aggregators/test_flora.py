"""Expected values come from numpy: stacks of factors multiplied out in float64."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.flora import Flora
from flexlora.federation.known_rows import known_rows
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.q_proj": (12, 12), "mlp.down_proj": (10, 17), "mlp.up_proj": (17, 10)}
SCALING = Scaling("constant_alpha", 16.0)
SERVER_RANK = 6
COHORT = [(2, 1.0), (4, 3.0), (6, 4.0)]


def adapter(rank: int, seed: int, leave_out: str = "") -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, shape[1], generator=rng), torch.randn(shape[0], rank, generator=rng), SCALING(rank)
        )
        for module, shape in SHAPES.items()
        if module != leave_out
    }


def initial() -> AdapterState:
    return {m: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for m, f in adapter(SERVER_RANK, 99).items()}


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


def stacked(updates: list[Update], module: str) -> np.ndarray:
    """Return the product of the paper's stacks, each row block of A weighed and scaled."""
    total = sum(update.weight for update in updates)
    own = [(u.payload[module], u.weight / total) for u in updates if module in u.payload]
    B = np.concatenate([f.B.double().numpy() for f, _ in own], axis=1)
    A = np.concatenate([weight * f.scaling * f.A.double().numpy() for f, weight in own])
    return B @ A


def floats(factors: AdapterState | None) -> int:
    return sum(f.A.numel() + f.B.numel() for f in (factors or {}).values())


def test_each_round_adds_the_product_of_the_stacks_to_the_model_of_every_client():
    aggregator = Flora(scaling=SCALING)
    state, expected = aggregator.init(initial()), {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for server_round in range(4):
        updates = [
            Update(str(rank), adapter(rank, 10 * server_round + rank, "mlp.up_proj" if rank == 4 else ""), weight)
            for rank, weight in COHORT
        ]
        state = aggregator.aggregate(state, updates)
        for module in SHAPES:
            expected[module] += stacked(updates, module)
            error = np.linalg.norm(state.change.spectra[module].delta().numpy() - expected[module])
            assert error < 1e-12 * np.linalg.norm(expected[module])
        for ranks in ({"attn.q_proj": 1}, dict.fromkeys(SHAPES, 3)):
            sent = aggregator.broadcast(state, ranks)
            assert sent.frozen is not None
            for module, W in expected.items():  # modules that the client lacks too
                assert np.linalg.norm(dense(sent.frozen[module]) - W) < 1e-6 * np.linalg.norm(W)


@pytest.mark.parametrize("rank", [1, 3, SERVER_RANK])
def test_clients_start_each_round_from_the_first_initial_rows_and_a_zero_b(rank: int):
    aggregator = Flora(scaling=SCALING)
    state = aggregator.init(initial())
    for server_round in range(2):
        sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, rank))
        assert (sent.train_factors, sent.known_A) == ("both", None)
        for module, factors in sent.trainable.items():
            assert torch.equal(factors.A, initial()[module].A[:rank]) and not factors.B.any()
            assert factors.scaling == SCALING(rank)
        state = aggregator.aggregate(state, [Update("a", adapter(2, server_round), 1.0)])


def test_a_rank_above_the_servers_gets_further_rows():
    aggregator = Flora(scaling=SCALING)
    factors = aggregator.broadcast(aggregator.init(initial()), {"mlp.down_proj": 8}).trainable["mlp.down_proj"]
    assert torch.equal(factors.A[:SERVER_RANK], initial()["mlp.down_proj"].A) and factors.A.any(dim=1).all()


def test_redrawn_rows_are_those_of_the_seed_that_is_sent_and_new_in_each_round():
    aggregator, found = Flora(scaling=SCALING, redraw_seed=3), []
    state = aggregator.init(initial())
    first = aggregator.broadcast(state, {"mlp.down_proj": 4})
    assert first.known_A is None and torch.equal(first.trainable["mlp.down_proj"].A, initial()["mlp.down_proj"].A[:4])
    for server_round in range(2):
        state = aggregator.aggregate(state, [Update("a", adapter(2, server_round), 1.0)])
        large, small = (aggregator.broadcast(state, {"mlp.down_proj": rank}) for rank in (4, 2))
        assert isinstance(large.known_A, int) and large.known_A == small.known_A
        A = large.trainable["mlp.down_proj"].A
        assert torch.equal(A, known_rows(large.known_A, "mlp.down_proj", 4, 17))
        assert torch.equal(A[:2], small.trainable["mlp.down_proj"].A)
        assert not large.trainable["mlp.down_proj"].B.any()
        found.append(A)
    assert not torch.equal(found[0], found[1])


def test_echoes_change_nothing_and_one_client_is_a_fixed_point_at_mixed_ranks():
    aggregator = Flora(scaling=SCALING)
    payload = adapter(4, 1)
    state = aggregator.aggregate(aggregator.init(initial()), [Update("only", payload, 7.0)])
    for _ in range(3):
        echoes = [
            Update(str(rank), aggregator.broadcast(state, dict.fromkeys(SHAPES, rank)).trainable, weight)
            for rank, weight in COHORT
        ]
        state = aggregator.aggregate(state, echoes)
    for module, factors in payload.items():
        np.testing.assert_allclose(state.change.spectra[module].delta().numpy(), dense(factors), rtol=0, atol=1e-11)


def test_the_model_does_not_depend_on_the_gauge_or_the_order_of_the_payloads():
    aggregator, rng = Flora(scaling=SCALING), np.random.default_rng(0)
    updates = [Update(str(rank), adapter(rank, rank), weight) for rank, weight in COHORT]

    def turned(factors: LoraFactors) -> LoraFactors:
        M = torch.tensor(rng.standard_normal((factors.rank, factors.rank)) + 3 * np.eye(factors.rank))
        return LoraFactors(torch.linalg.solve(M, factors.A.double()), factors.B.double() @ M, factors.scaling)

    others = [Update(u.client_id, {m: turned(f) for m, f in u.payload.items()}, u.weight) for u in updates[::-1]]
    state = aggregator.init(initial())
    first, second = (aggregator.aggregate(state, one).change.spectra for one in (updates, others))
    for module in SHAPES:
        W = first[module].delta()
        assert (second[module].delta() - W).norm() < 1e-11 * W.norm()


def test_what_is_sent_grows_by_the_stack_of_each_round_up_to_the_shorter_side():
    aggregator = Flora(scaling=SCALING)
    state, sides, in_and_out = aggregator.init(initial()), [12, 10, 10], [24, 27, 27]
    ranks = dict.fromkeys(SHAPES, 3)
    for server_round in range(4):
        sent: Broadcast = aggregator.broadcast(state, ranks)
        assert floats(sent.trainable) == sum(3 * both for both in in_and_out)
        # The paper sends the stack of one round, of rank sum r_i = 5, and clients remember the rest.
        kept = [min(5 * server_round, side) for side in sides]
        assert floats(sent.frozen) == sum(rank * both for rank, both in zip(kept, in_and_out, strict=True))
        updates = [Update(str(rank), adapter(rank, 10 * server_round + rank), 1.0) for rank in (2, 3)]
        state = aggregator.aggregate(state, updates)
