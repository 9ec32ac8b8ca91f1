"""Expected values come from numpy. Which directions a client has is read off the rows that it was sent."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract_client import reply
from flexlora.aggregators.contract_compare import change_of
from flexlora.aggregators.fed_plora import FedPLora, FedPLoraState
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"k_proj": (6, 20), "down_proj": (20, 11)}
R = 6
SCALINGS = [Scaling("constant_alpha", 16.0), Scaling("constant_ratio", 2.0), Scaling("rslora", 3.0)]
COHORT = {"a": (1, 3.0), "b": (2, 1.0), "c": (4, 2.0), "d": (3, 4.0)}
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


def learned(method: FedPLora) -> FedPLoraState:
    """Return the state after a client of full rank has trained every direction."""
    state = method.init(initial(method.scaling))
    sent = method.broadcast_to(state, uniform(R), "first")
    return method.aggregate(state, [Update("first", trained(sent, 5), 1.0)])


def updates_of(method: FedPLora, state: FedPLoraState) -> list[Update]:
    return [
        Update(client, trained(method.broadcast_to(state, uniform(rank), client), seed), weight)
        for seed, (client, (rank, weight)) in enumerate(COHORT.items())
    ]


def directions(state: FedPLoraState, sent: Broadcast, module: str) -> list[int]:
    server = state.adapter[module].A.numpy()
    return [int(np.abs(server - row).sum(1).argmin()) for row in sent.trainable[module].A.double().numpy()]


def whole(state: FedPLoraState, module: str) -> np.ndarray:
    factors = state.adapter[module]
    return factors.B.numpy() @ factors.A.numpy()


@every_scaling
def test_every_client_starts_from_the_whole_model(scaling: Scaling):
    method = FedPLora(scaling)
    state = learned(method)
    for client in "abcde":
        for plan in [uniform(rank) for rank in range(1, R + 1)] + [{"k_proj": 1, "down_proj": 4}]:
            for module, change in change_of(method.broadcast_to(state, plan, client)).items():
                np.testing.assert_allclose(change, whole(state, module), rtol=1e-5, atol=1e-5)


def test_a_client_that_lacks_a_module_has_all_of_it_in_its_frozen_branch():
    method = FedPLora(SCALINGS[0])
    state = learned(method)
    for sent in (method.broadcast_to(state, {"k_proj": 2}, "a"), method.broadcast(state, {"k_proj": 2})):
        assert list(sent.trainable) == ["k_proj"] and sent.frozen is not None
        np.testing.assert_allclose(sent.frozen["down_proj"].delta(), whole(state, "down_proj"), rtol=1e-5, atol=1e-5)


@every_scaling
def test_each_direction_becomes_the_mean_over_those_who_trained_it(scaling: Scaling):
    method = FedPLora(scaling)
    state = learned(method)
    updates = updates_of(method, state)
    after = method.aggregate(state, updates)
    covered = set()
    for module in SHAPES:
        A, B, W = np.zeros((R, SHAPES[module][1])), np.zeros((SHAPES[module][0], R)), np.zeros(R)
        for update in updates:
            rank, weight = COHORT[update.client_id]
            chosen = directions(state, method.broadcast_to(state, uniform(rank), update.client_id), module)
            f = update.payload[module]
            A[chosen] += weight * f.A.double().numpy()
            B[:, chosen] += weight * scaling(rank) * f.B.double().numpy()
            W[chosen] += weight
        for j in range(R):
            found = after.adapter[module]
            if W[j] > 0:
                np.testing.assert_allclose(found.A[j], A[j] / W[j], rtol=1e-10)
                np.testing.assert_allclose(found.B[:, j], B[:, j] / W[j], rtol=1e-10, atol=1e-12)
            covered.add(W[j] > 0)
    assert True in covered


def test_directions_that_nobody_trained_keep_every_bit():
    method = FedPLora(SCALINGS[0])
    state = learned(method)
    sent = method.broadcast_to(state, {"k_proj": 2}, "only")
    after = method.aggregate(state, [Update("only", trained(sent, 1), 2.0)])
    rest = sorted(set(range(R)) - set(directions(state, sent, "k_proj")))
    assert len(rest) == R - 2
    assert torch.equal(after.adapter["k_proj"].A[rest], state.adapter["k_proj"].A[rest])
    assert torch.equal(after.adapter["k_proj"].B[:, rest], state.adapter["k_proj"].B[:, rest])
    assert torch.equal(after.adapter["down_proj"].B, state.adapter["down_proj"].B)


@every_scaling
def test_an_echo_of_all_clients_changes_nothing_and_no_direction_decays(scaling: Scaling):
    method = FedPLora(scaling)
    start = state = learned(method)
    for _ in range(4):
        echo = [
            Update(client, method.broadcast_to(state, uniform(rank), client).trainable, weight)
            for client, (rank, weight) in COHORT.items()
        ]
        state = method.aggregate(state, echo)
    for module in SHAPES:
        np.testing.assert_allclose(whole(state, module), whole(start, module), rtol=1e-5, atol=1e-5)


def test_one_client_gets_the_model_back_that_it_trained():
    method = FedPLora(SCALINGS[0])
    state = learned(method)
    sent = method.broadcast_to(state, uniform(2), "only")
    payload = trained(sent, 1)
    after = method.aggregate(state, [Update("only", payload, 2.0)])
    expected = change_of(Broadcast(payload, sent.frozen))
    again = change_of(method.broadcast_to(after, uniform(2), "only"))
    for module in SHAPES:
        np.testing.assert_allclose(again[module], expected[module], rtol=1e-5, atol=1e-5)


def test_the_order_of_clients_does_not_matter():
    method = FedPLora(SCALINGS[0])
    state = learned(method)
    updates = updates_of(method, state)
    first, again = method.aggregate(state, updates), method.aggregate(state, updates[::-1])
    for module in SHAPES:
        np.testing.assert_allclose(whole(again, module), whole(first, module), rtol=1e-12, atol=1e-13)


def test_the_bias_at_full_rank_is_the_covariance_of_the_factors():
    scaling = SCALINGS[0]
    method = FedPLora(scaling)
    state = learned(method)
    updates = [
        Update(client, trained(method.broadcast_to(state, uniform(R), client), seed), weight)
        for seed, (client, weight) in enumerate([("a", 1.0), ("b", 2.0), ("c", 5.0)])
    ]
    after = method.aggregate(state, updates)
    for module in SHAPES:
        parts = [
            (u.weight / 8, scaling(R) * u.payload[module].B.double().numpy(), u.payload[module].A.double().numpy())
            for u in updates
        ]
        mean_B, mean_A = sum(w * B for w, B, _ in parts), sum(w * A for w, _, A in parts)
        mean_of_products = sum(w * B @ A for w, B, A in parts)
        covariance = sum(w * (B - mean_B) @ (A - mean_A) for w, B, A in parts)
        np.testing.assert_allclose(mean_of_products - whole(after, module), covariance, atol=1e-10)


def test_a_client_returns_its_rank_and_receives_the_whole_rank():
    method = FedPLora(SCALINGS[0])
    state = learned(method)
    for module, (out_features, in_features) in SHAPES.items():
        for rank in range(1, R):
            sent = method.broadcast_to(state, uniform(rank), "a")
            sizes = [f.A.numel() + f.B.numel() for f in (sent.trainable[module], sent.frozen[module])]
            assert sizes == [rank * (out_features + in_features), (R - rank) * (out_features + in_features)]


def test_nothing_is_frozen_while_all_directions_are_zero():
    method = FedPLora(SCALINGS[0])
    assert method.broadcast_to(method.init(initial(SCALINGS[0])), uniform(2), "a").frozen is None


def test_clients_and_rounds_choose_differently_unless_told_to_take_the_first():
    random, first = FedPLora(SCALINGS[0]), FedPLora(SCALINGS[0], selection="first")
    state = learned(random)
    later = FedPLoraState(state.adapter, state.seed, state.num_rounds + 1)
    choices = {
        tuple(directions(state, random.broadcast_to(own, uniform(3), client), "k_proj"))
        for own in (state, later)
        for client in "abcdef"
    }
    assert len(choices) > 6
    assert directions(state, first.broadcast_to(later, uniform(3), "b"), "k_proj") == [0, 1, 2]


def test_a_small_rank_is_scored_with_the_best_approximation_of_that_rank():
    method = FedPLora(SCALINGS[0])
    state = learned(method)
    U, S, Vh = np.linalg.svd(whole(state, "k_proj"))
    found = method.broadcast(state, uniform(2)).trainable["k_proj"].delta().numpy()
    np.testing.assert_allclose(found, (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-4)


def test_larger_ranks_and_sums_of_clients_are_refused():
    method = FedPLora(SCALINGS[0])
    state = learned(method)
    payload = trained(method.broadcast_to(state, uniform(R), "a"), 0)
    with pytest.raises(AggregationError, match="which client sent an update"):
        method.aggregate(state, [Update(None, payload, 1.0)])
    larger = {"k_proj": payload["k_proj"].pad(R + 1)}
    with pytest.raises(AggregationError, match=rf"1\.\.{R}.*got {R + 1}"):
        method.aggregate(state, [Update("a", larger, 1.0)])
    for send in (method.broadcast, lambda state, ranks: method.broadcast_to(state, ranks, "a")):
        with pytest.raises(AggregationError, match=rf"1\.\.{R}.*got {R + 1}"):
            send(state, uniform(R + 1))
