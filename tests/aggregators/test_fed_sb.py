"""Expected values come from numpy: dense float64 sums and numpy.linalg.svd."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract_client import reply
from flexlora.aggregators.fed_sb import FedSb, FedSbState
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import LoraFactors, Scaling

SHAPES = {"k_proj": (6, 20), "down_proj": (20, 11)}
R = 4
SCALINGS = [Scaling("constant_alpha", 16.0), Scaling("constant_ratio", 2.0), Scaling("rslora", 3.0)]
COHORT = {"a": (1, 3.0), "b": (2, 1.0), "c": (4, 2.0), "d": (3, 4.0)}
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.policy)


def initial(scaling: Scaling) -> dict[str, LoraFactors]:
    rng = torch.Generator().manual_seed(0)
    return {
        m: LoraFactors(torch.randn(R, s[1], generator=rng), torch.zeros(s[0], R), scaling(R)) for m, s in SHAPES.items()
    }


def uniform(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def lora_round(method: FedSb, state: FedSbState, ranks: Mapping[str, int] = {m: R for m in SHAPES}) -> list[Update]:
    return [reply(method.broadcast(state, ranks), c, 1.0 + seed, seed) for seed, c in enumerate("abc")]


def with_cores(method: FedSb) -> FedSbState:
    """Return the state after the first round, in which three clients of full rank trained LoRA."""
    state = method.init(initial(method.scaling))
    return method.aggregate(state, lora_round(method, state))


def core_update(sent: Broadcast, client: str, weight: float, seed: int | None) -> Update:
    """Return an update with noise on the cores, or an echo for no seed."""
    assert sent.train_factors == "core"
    return reply(sent, client, weight, seed or 0, 0.0 if seed is None else 0.3)


def product(factors: LoraFactors, core: Tensor) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ core.double().numpy() @ factors.A.double().numpy()


def received(method: FedSb, state: FedSbState, ranks: Mapping[str, int]) -> dict[str, np.ndarray]:
    sent = method.broadcast(state, ranks)
    assert sent.cores is not None
    return {module: product(factors, sent.cores[module]) for module, factors in sent.trainable.items()}


@every_scaling
def test_after_the_first_round_clients_have_flexloras_model_as_a_diagonal_core(scaling: Scaling):
    method = FedSb(scaling)
    state = method.init(initial(scaling))
    updates = lora_round(method, state)
    state = method.aggregate(state, updates)
    for module in SHAPES:
        W = sum(u.weight / 6 * u.payload[module].delta().numpy() for u in updates)
        U, S, Vh = np.linalg.svd(W)
        found = received(method, state, uniform(R))[module]
        np.testing.assert_allclose(found, (U[:, :R] * S[:R]) @ Vh[:R], rtol=1e-4, atol=1e-5 * S[0])
        sent = method.broadcast(state, uniform(R))
        np.testing.assert_allclose(scaling(R) * sent.cores[module], np.diag(S[:R]), rtol=1e-5, atol=1e-5 * S[0])
        np.testing.assert_allclose(sent.trainable[module].A @ sent.trainable[module].A.T, np.eye(R), atol=1e-5)
        np.testing.assert_allclose(sent.trainable[module].B.T @ sent.trainable[module].B, np.eye(R), atol=1e-5)


@every_scaling
def test_the_mean_of_cores_is_the_mean_of_products(scaling: Scaling):
    method = FedSb(scaling)
    state = with_cores(method)
    sent = method.broadcast(state, uniform(R))
    updates = [core_update(sent, c, 1.0 + seed, seed) for seed, c in enumerate("abc")]
    after = method.aggregate(state, updates)
    for module in SHAPES:
        expected = sum(u.weight / 6 * product(u.payload[module], u.cores[module]) for u in updates)
        norm = np.linalg.norm(expected)
        assert np.linalg.norm(received(method, after, uniform(R))[module] - expected) < 1e-6 * norm
        assert np.linalg.norm(method.spectra(after)[module].delta().numpy() - expected) < 1e-6 * norm
        assert torch.equal(method.broadcast(after, uniform(R)).trainable[module].A, sent.trainable[module].A)


@every_scaling
def test_smaller_ranks_hold_leading_blocks_and_entries_are_averaged_over_those_who_hold_them(scaling: Scaling):
    method = FedSb(scaling)
    state = with_cores(method)
    before = {
        module: scaling(R) * C.double().numpy() for module, C in method.broadcast(state, uniform(R)).cores.items()
    }
    cohort = {client: (min(rank, 3), weight) for client, (rank, weight) in COHORT.items()}  # nobody holds the last
    updates = [
        core_update(method.broadcast(state, uniform(rank)), client, weight, seed)
        for seed, (client, (rank, weight)) in enumerate(cohort.items())
    ]
    after = method.aggregate(state, updates)
    for module in SHAPES:
        total, W = np.zeros((R, R)), np.zeros((R, R))
        for update in updates:
            rank, weight = cohort[update.client_id]
            total[:rank, :rank] += weight * scaling(rank) * update.cores[module].double().numpy()
            W[:rank, :rank] += weight
        expected = np.where(W > 0, total / np.where(W > 0, W, 1), before[module])
        for rank in range(1, R + 1):
            sent = method.broadcast(after, uniform(rank))
            np.testing.assert_allclose(
                scaling(rank) * sent.cores[module],
                expected[:rank, :rank],
                rtol=1e-5,
                atol=1e-5 * np.abs(expected).max(),
            )
            full = method.broadcast(after, uniform(R)).trainable[module]
            assert torch.equal(sent.trainable[module].A, full.A[:rank])
            assert torch.equal(sent.trainable[module].B, full.B[:, :rank])


@every_scaling
def test_an_echo_of_mixed_ranks_changes_nothing(scaling: Scaling):
    method = FedSb(scaling)
    start = state = with_cores(method)
    for _ in range(4):
        echo = [core_update(method.broadcast(state, uniform(r)), c, w, None) for c, (r, w) in COHORT.items()]
        state = method.aggregate(state, echo)
    for module, expected in received(method, start, uniform(R)).items():
        found = received(method, state, uniform(R))[module]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_one_client_gets_back_what_it_sent():
    method = FedSb(SCALINGS[0])
    state = with_cores(method)
    update = core_update(method.broadcast(state, uniform(2)), "only", 3.0, 1)
    after = method.aggregate(state, [update])
    for module, found in received(method, after, uniform(2)).items():
        np.testing.assert_allclose(found, product(update.payload[module], update.cores[module]), rtol=1e-5, atol=1e-6)


def test_the_order_of_clients_does_not_matter_and_who_lacks_a_module_does_not_count_there():
    method = FedSb(SCALINGS[0])
    state = with_cores(method)
    plans = [uniform(4), {"k_proj": 2}, uniform(3)]
    updates = [
        core_update(method.broadcast(state, plan), c, 1.0 + i, i)
        for i, (c, plan) in enumerate(zip("abc", plans, strict=True))
    ]
    first, again = method.aggregate(state, updates), method.aggregate(state, updates[::-1])
    without = method.aggregate(state, [updates[0], updates[2]])
    for module in SHAPES:
        core = first.subspaces[module].core
        np.testing.assert_allclose(again.subspaces[module].core, core, rtol=1e-12, atol=1e-13)
    assert torch.equal(without.subspaces["down_proj"].core, first.subspaces["down_proj"].core)


def test_bases_are_completed_where_the_first_round_brought_fewer_directions():
    method = FedSb(SCALINGS[0])
    state = method.init(initial(SCALINGS[0]))
    payload = reply(method.broadcast(state, {"k_proj": 1}), "small", 1.0, 0).payload
    state = method.aggregate(state, [Update("small", payload, 1.0)])
    sent = method.broadcast(state, uniform(R))
    for module, factors in sent.trainable.items():
        np.testing.assert_allclose(factors.A @ factors.A.T, np.eye(R), atol=1e-5)
        np.testing.assert_allclose(factors.B.T @ factors.B, np.eye(R), atol=1e-5)
        expected = payload[module].delta() if module in payload else torch.zeros(SHAPES[module])
        np.testing.assert_allclose(product(factors, sent.cores[module]), expected, rtol=1e-5, atol=1e-5)
    # The spare rows of the initial A span, with what was learned, the same space as before: nothing random in A.
    rows = np.concatenate([payload["k_proj"].A.numpy(), initial(SCALINGS[0])["k_proj"].A.numpy()[1:]])
    assert np.linalg.matrix_rank(np.concatenate([rows, sent.trainable["k_proj"].A.numpy()]), tol=1e-4) == R


def test_ordinary_lora_is_trained_in_the_first_rounds_and_after_every_so_many_rounds_of_cores():
    method = FedSb(SCALINGS[0], warmup_rounds=2, refresh_every=3)
    state, trains = method.init(initial(SCALINGS[0])), ""
    for seed in range(11):
        sent = method.broadcast(state, uniform(R))
        trains += "L" if sent.train_factors == "both" else "c"
        state = method.aggregate(state, [reply(sent, "a", 1.0, seed)])
    assert trains == "LLcccLcccLc"


@every_scaling
def test_nothing_is_lost_when_bases_are_chosen_anew(scaling: Scaling):
    method = FedSb(scaling, refresh_every=1)
    state = with_cores(method)
    state = method.aggregate(state, [core_update(method.broadcast(state, uniform(R)), "a", 1.0, 3)])
    expected = {module: spectrum.delta().numpy() for module, spectrum in method.spectra(state).items()}
    echo = [Update(c, method.broadcast(state, uniform(r)).trainable, w) for c, (r, w) in COHORT.items()]
    state = method.aggregate(state, echo)
    for module, found in received(method, state, uniform(R)).items():
        norm = np.linalg.norm(expected[module])
        assert np.linalg.norm(found - expected[module]) < 1e-6 * norm


def test_only_the_core_is_returned_while_bases_travel_to_clients_that_remember_nothing():
    method = FedSb(SCALINGS[0])
    state = with_cores(method)
    for rank in range(1, R + 1):
        sent = method.broadcast(state, uniform(rank))
        for module, (out_features, in_features) in SHAPES.items():
            assert sent.cores[module].numel() == rank**2
            assert sent.trainable[module].A.numel() + sent.trainable[module].B.numel() == rank * (
                out_features + in_features
            )


def test_an_update_without_cores_or_of_a_larger_rank_is_refused():
    method = FedSb(SCALINGS[0])
    state = with_cores(method)
    sent = method.broadcast(state, uniform(R))
    with pytest.raises(AggregationError, match=r"needs one for each module.*'a' sent \[\]"):
        method.aggregate(state, [Update("a", sent.trainable, 1.0)])
    with pytest.raises(AggregationError, match=rf"1\.\.{R}.*got {R + 1}"):
        method.broadcast(state, uniform(R + 1))
    larger = {"k_proj": sent.trainable["k_proj"].pad(R + 1)}
    with pytest.raises(AggregationError, match=rf"1\.\.{R}.*got {R + 1}"):
        method.aggregate(state, [Update("a", larger, 1.0, cores={"k_proj": torch.zeros(R + 1, R + 1)})])
