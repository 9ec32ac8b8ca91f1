"""Expected values come from numpy. Which directions a client has is read off the rows that it was sent."""

from itertools import combinations

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract_client import reply
from flexlora.aggregators.contract_compare import change_of
from flexlora.aggregators.fs_lora import FsLora, FsLoraState, sketched
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"k_proj": (6, 20), "down_proj": (20, 11)}
R = 6
SCALINGS = [Scaling("constant_alpha", 16.0), Scaling("constant_ratio", 2.0), Scaling("rslora", 3.0)]
COHORT = {"a": (1, 3.0), "b": (2, 1.0), "c": (4, 2.0), "d": (6, 4.0)}
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.policy)


def initial(scaling: Scaling) -> dict[str, LoraFactors]:
    rng = torch.Generator().manual_seed(0)
    return {
        m: LoraFactors(torch.randn(R, s[1], generator=rng), torch.zeros(s[0], R), scaling(R)) for m, s in SHAPES.items()
    }


def trained(sent: Broadcast, seed: int) -> AdapterState:
    return reply(sent, "any", 1.0, seed).payload


def uniform(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def learned(method: FsLora) -> FsLoraState:
    """Return the state after a client of full rank has trained every direction."""
    state = method.init(initial(method.scaling))
    sent = method.broadcast_to(state, uniform(R), "first")
    return method.aggregate(state, [Update("first", trained(sent, 5), 1.0)])


def directions(state: FsLoraState, sent: Broadcast, module: str) -> list[int]:
    server = state.adapter[module].A.numpy()
    return [int(np.abs(server - row).sum(1).argmin()) for row in sent.trainable[module].A.double().numpy()]


def whole(state: FsLoraState, module: str) -> np.ndarray:
    factors = state.adapter[module]
    return factors.B.numpy() @ factors.A.numpy()


@every_scaling
@pytest.mark.parametrize("k", range(1, R + 1))
def test_the_mean_over_all_sketches_is_the_whole_product(k: int, scaling: Scaling):
    state = learned(FsLora(scaling))
    for module in SHAPES:
        server = state.adapter[module]
        changes = [
            sketched(server, torch.tensor(chosen), scaling(k)).delta().numpy() for chosen in combinations(range(R), k)
        ]
        np.testing.assert_allclose(np.mean(changes, axis=0), whole(state, module), rtol=1e-5, atol=1e-5)


@every_scaling
def test_a_client_runs_its_columns_and_rows_times_the_inverse_of_its_share(scaling: Scaling):
    method = FsLora(scaling)
    state = learned(method)
    for client, (rank, _) in COHORT.items():
        sent = method.broadcast_to(state, uniform(rank), client)
        for module, change in change_of(sent).items():
            chosen = directions(state, sent, module)
            assert len(set(chosen)) == rank
            server = state.adapter[module]
            expected = R / rank * server.B[:, chosen].numpy() @ server.A[chosen].numpy()
            np.testing.assert_allclose(change, expected, rtol=1e-5, atol=1e-5)


def test_under_alpha_over_rank_clients_train_the_columns_of_b_themselves():
    scaling = SCALINGS[0]
    method = FsLora(scaling)
    state = learned(method)
    sent = method.broadcast_to(state, uniform(2), "a")
    columns = state.adapter["k_proj"].B[:, directions(state, sent, "k_proj")] / scaling(R)
    np.testing.assert_allclose(sent.trainable["k_proj"].B, columns, rtol=1e-6)


@every_scaling
def test_the_server_adds_the_mean_of_the_changes_of_the_global_factors(scaling: Scaling):
    method = FsLora(scaling)
    state = learned(method)
    sent = {client: method.broadcast_to(state, uniform(rank), client) for client, (rank, _) in COHORT.items()}
    updates = [
        Update(client, trained(sent[client], seed), weight) for seed, (client, (_, weight)) in enumerate(COHORT.items())
    ]
    after = method.aggregate(state, updates)
    for module in SHAPES:
        A, B = state.adapter[module].A.numpy().copy(), state.adapter[module].B.numpy().copy()
        for update in updates:
            rank, weight = COHORT[update.client_id]
            chosen = directions(state, sent[update.client_id], module)
            before, now = sent[update.client_id].trainable[module], update.payload[module]
            A[chosen] += weight / 10 * (now.A.double().numpy() - before.A.double().numpy())
            change = now.B.double().numpy() - before.B.double().numpy()
            B[:, chosen] += weight / 10 * scaling(rank) * rank / R * change
        np.testing.assert_allclose(after.adapter[module].A, A, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(after.adapter[module].B, B, rtol=1e-10, atol=1e-12)


@every_scaling
def test_an_echo_changes_no_bit(scaling: Scaling):
    method = FsLora(scaling)
    state = learned(method)
    echo = [
        Update(client, method.broadcast_to(state, uniform(rank), client).trainable, weight)
        for client, (rank, weight) in COHORT.items()
    ]
    after = method.aggregate(state, echo)
    for module in SHAPES:
        assert torch.equal(after.adapter[module].A, state.adapter[module].A)
        assert torch.equal(after.adapter[module].B, state.adapter[module].B)


@every_scaling
def test_one_clients_directions_become_its_own_and_the_others_keep_every_bit(scaling: Scaling):
    method = FsLora(scaling)
    state = learned(method)
    for rank in (2, R):
        sent = method.broadcast_to(state, uniform(rank), "only")
        payload = trained(sent, 1)
        after = method.aggregate(state, [Update("only", payload, 2.0)])
        for module in SHAPES:
            chosen, found = directions(state, sent, module), after.adapter[module]
            rest = sorted(set(range(R)) - set(chosen))
            own = R / rank * found.B[:, chosen].numpy() @ found.A[chosen].numpy()
            np.testing.assert_allclose(own, payload[module].delta(), rtol=1e-5, atol=1e-5)
            assert torch.equal(found.A[rest], state.adapter[module].A[rest])
            assert torch.equal(found.B[:, rest], state.adapter[module].B[:, rest])
    # At full rank there is nothing to draw: it gets back the model that it sent.
    again = change_of(method.broadcast_to(after, uniform(R), "only"))
    for module in SHAPES:
        np.testing.assert_allclose(again[module], payload[module].delta(), rtol=1e-5, atol=1e-5)


def test_the_order_of_clients_does_not_matter_and_who_lacks_a_module_changes_none():
    method = FsLora(SCALINGS[0])
    state = learned(method)
    plans = [uniform(2), {"k_proj": 3}, uniform(1)]
    updates = [
        Update(client, trained(method.broadcast_to(state, plan, client), seed), 1.0 + seed)
        for seed, (client, plan) in enumerate(zip("abc", plans, strict=True))
    ]
    first, again = method.aggregate(state, updates), method.aggregate(state, updates[::-1])
    for module in SHAPES:
        np.testing.assert_allclose(whole(again, module), whole(first, module), rtol=1e-12, atol=1e-13)
    without = method.aggregate(state, [updates[0], updates[2]])
    # Its weight counts: 2 of 6 change nothing in the module that it lacks.
    moved = first.adapter["down_proj"].A - state.adapter["down_proj"].A
    np.testing.assert_allclose(
        moved, 4 / 6 * (without.adapter["down_proj"].A - state.adapter["down_proj"].A), atol=1e-14
    )


def test_a_model_is_scored_with_all_directions_and_small_ranks_with_the_best_approximation():
    method = FsLora(SCALINGS[0])
    state = learned(method)
    full = method.broadcast(state, uniform(R)).trainable["k_proj"]
    np.testing.assert_allclose(full.A, state.adapter["k_proj"].A, rtol=1e-6)
    np.testing.assert_allclose(full.delta(), whole(state, "k_proj"), rtol=1e-5, atol=1e-5)
    U, S, Vh = np.linalg.svd(whole(state, "k_proj"))
    found = method.broadcast(state, uniform(2)).trainable["k_proj"].delta()
    np.testing.assert_allclose(found, (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-4)


def test_a_client_receives_and_returns_its_own_rank_alone():
    method = FsLora(SCALINGS[0])
    state = learned(method)
    for module, (out_features, in_features) in SHAPES.items():
        for rank in range(1, R + 1):
            sent = method.broadcast_to(state, uniform(rank), "a")
            factors = sent.trainable[module]
            assert sent.frozen is None
            assert factors.A.numel() + factors.B.numel() == rank * (out_features + in_features)


def test_larger_ranks_and_sums_of_clients_are_refused():
    method = FsLora(SCALINGS[0])
    state = learned(method)
    payload = trained(method.broadcast_to(state, uniform(R), "a"), 0)
    with pytest.raises(AggregationError, match="which client sent an update"):
        method.aggregate(state, [Update(None, payload, 1.0)])
    with pytest.raises(AggregationError, match=rf"1\.\.{R}.*got {R + 1}"):
        method.aggregate(state, [Update("a", {"k_proj": payload["k_proj"].pad(R + 1)}, 1.0)])
    for send in (method.broadcast, lambda state, ranks: method.broadcast_to(state, ranks, "a")):
        with pytest.raises(AggregationError, match=rf"1\.\.{R}.*got {R + 1}"):
            send(state, uniform(R + 1))
