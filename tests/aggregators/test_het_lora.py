"""Expected values come from numpy: dense products, their norms, and factors padded and averaged by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, SHAPES, Case
from flexlora.aggregators.het_lora import HetLora
from flexlora.aggregators.zero_pad import ZeroPad
from flexlora.federation.messages import TailPenalty, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SCALING = Scaling("constant_alpha", 16.0)
PLAIN = {"self_pruning": False}
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.policy)


def all_modules(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def in_another_gauge(adapter: AdapterState) -> AdapterState:
    """Return ``(B M, M^-1 A)`` in float64: other factors, the same product."""
    rng = np.random.default_rng(0)
    turned: dict[str, LoraFactors] = {}
    for module, f in adapter.items():
        M = np.eye(f.rank) + 0.4 * rng.standard_normal((f.rank, f.rank)) / f.rank
        A, B = np.linalg.solve(M, f.A.double().numpy()), f.B.double().numpy() @ M
        turned[module] = LoraFactors(torch.tensor(A), torch.tensor(B), f.scaling)
    return turned


def shrunk(adapter: AdapterState, factor: float) -> AdapterState:
    """Return the adapter with the last column of each ``B`` multiplied by ``factor``."""
    smaller: dict[str, LoraFactors] = {}
    for module, factors in adapter.items():
        B = factors.B.clone()
        B[:, -1] *= factor
        smaller[module] = LoraFactors(factors.A, B, factors.scaling)
    return smaller


def ranks_of(adapter: AdapterState) -> set[int]:
    return {factors.rank for factors in adapter.values()}


@every_scaling
def test_padded_factors_are_averaged_by_the_norms_of_the_scaled_products(scaling: Scaling) -> None:
    case = Case(HetLora, PLAIN, scaling)
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    after = case.aggregator.aggregate(state, updates)
    for module, found in after.adapter.items():
        parts = [
            (u.payload[module].scaling * u.payload[module].B.double().numpy(), u.payload[module].A.double().numpy())
            for u in updates
        ]
        norms = np.array([np.linalg.norm(B @ A) for B, A in parts])
        A = sum(S * np.pad(A, ((0, SERVER_RANK - len(A)), (0, 0))) for S, (_, A) in zip(norms, parts, strict=True))
        B = sum(S * np.pad(B, ((0, 0), (0, SERVER_RANK - len(A)))) for S, (B, A) in zip(norms, parts, strict=True))
        np.testing.assert_allclose(found.A.numpy(), A / norms.sum(), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(found.B.numpy(), B / norms.sum(), rtol=1e-11, atol=1e-12)


def test_weights_depend_neither_on_the_amount_of_data_nor_on_how_a_product_is_split() -> None:
    case = Case(HetLora, PLAIN, SCALING)
    state = case.after_a_round()
    first, *others = case.updates(state, seed=1)
    turned = Update(first.client_id, in_another_gauge(first.payload), weight=1e3 * first.weight)
    before = case.aggregator.aggregate(state, [first, *others])
    after = case.aggregator.aggregate(state, [turned, *others])
    for module, found in after.adapter.items():
        # All other clients' shares are unchanged if what the mean moves by is the first one's share of its own change.
        norms = np.array([u.payload[module].norm() for u in [first, *others]])
        rank = first.payload[module].rank
        moved = (found.A - before.adapter[module].A).numpy()[:rank]
        own = (turned.payload[module].A.double() - first.payload[module].A.double()).numpy()
        np.testing.assert_allclose(moved, norms[0] / norms.sum() * own, rtol=1e-6, atol=1e-9)


def test_without_norm_weights_and_pruning_it_is_zero_padding() -> None:
    case = Case(HetLora, {"norm_weights": False, "self_pruning": False}, SCALING)
    reference = Case(ZeroPad, {}, SCALING)
    state, expected = case.after_a_round(), reference.after_a_round()
    for module, factors in expected.adapter.items():
        assert torch.equal(state.adapter[module].A, factors.A) and torch.equal(state.adapter[module].B, factors.B)


def test_an_echo_decays_each_direction_by_its_share_of_the_norms_squared() -> None:
    case = Case(HetLora, {}, SCALING)
    state = case.after_a_round()
    ranks = (2, 4, 5)
    echoes = [
        Update(str(rank), case.aggregator.broadcast_to(state, all_modules(rank), str(rank)).trainable, 1.0)
        for rank in ranks
    ]
    after = case.aggregator.aggregate(state, echoes)
    assert after.num_prunings == {}
    for module, before in state.adapter.items():
        norms = [np.linalg.norm(before.B.numpy()[:, :rank] @ before.A.numpy()[:rank]) for rank in ranks]
        for j in range(SERVER_RANK):
            coverage = sum(norm for norm, rank in zip(norms, ranks, strict=True) if rank > j) / sum(norms)
            expected = coverage**2 * torch.outer(before.B[:, j], before.A[j])
            found = torch.outer(after.adapter[module].B[:, j], after.adapter[module].A[j])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_module_without_any_change_stays_as_it_is() -> None:
    case = Case(HetLora, {}, SCALING)
    state = case.start()
    after = case.aggregator.aggregate(
        state, [Update("a", case.aggregator.broadcast(state, all_modules(3)).trainable, 1.0)]
    )
    for module, factors in state.adapter.items():
        assert torch.equal(after.adapter[module].A, factors.A) and not after.adapter[module].B.any()


def test_a_client_whose_tail_has_shrunk_is_cut_and_stays_cut() -> None:
    method = HetLora(SCALING, gamma=0.8)
    case = Case(HetLora, {"gamma": 0.8}, SCALING)
    state = case.after_a_round()
    sent = {name: method.broadcast_to(state, all_modules(5), name).trainable for name in ("shrinks", "grows")}
    updates = [
        Update("shrinks", shrunk(sent["shrinks"], 0.9), 1.0),
        Update("grows", shrunk(sent["grows"], 1.1), 1.0),
    ]
    after = method.aggregate(state, updates)
    assert after.num_prunings == {"shrinks": 1}
    assert ranks_of(method.broadcast_to(after, all_modules(5), "shrinks").trainable) == {4}
    assert ranks_of(method.broadcast_to(after, all_modules(5), "grows").trainable) == {5}
    assert ranks_of(method.broadcast(after, all_modules(5)).trainable) == {5}
    sent_again = method.broadcast_to(after, all_modules(5), "shrinks")
    assert {factors.scaling for factors in sent_again.trainable.values()} == {SCALING(4)}
    again = method.aggregate(after, [Update("shrinks", shrunk(sent_again.trainable, 0.5), 1.0)])
    assert again.num_prunings == {"shrinks": 2}
    assert ranks_of(method.broadcast_to(again, all_modules(5), "shrinks").trainable) == {3}


def test_the_direction_that_is_cut_no_longer_counts_in_the_mean() -> None:
    method = HetLora(SCALING, gamma=0.8)
    state = Case(HetLora, {"gamma": 0.8}, SCALING).after_a_round()
    sent = method.broadcast_to(state, all_modules(5), "a").trainable
    after = method.aggregate(state, [Update("a", shrunk(sent, 0.9), 1.0)])
    for module, factors in state.adapter.items():
        # Nobody is left who holds the last direction.
        assert torch.equal(after.adapter[module].B[:, 4], factors.B[:, 4])
        assert torch.equal(after.adapter[module].A[4], factors.A[4])


def test_one_direction_always_stays() -> None:
    method = HetLora(SCALING, gamma=0.5)
    state = Case(HetLora, {"gamma": 0.5}, SCALING).after_a_round()
    for expected in (2, 1, 1):
        sent = method.broadcast_to(state, all_modules(5), "a").trainable
        state = method.aggregate(state, [Update("a", shrunk(sent, 0.1), 1.0)])
        assert ranks_of(method.broadcast_to(state, all_modules(5), "a").trainable) == {expected}
    assert state.num_prunings == {"a": 2}


@pytest.mark.parametrize(("gamma", "rank", "left"), [(0.29, 100, 29), (0.99, 8, 7), (0.99, 1, 1), (1.0, 5, 5)])
def test_the_rank_that_is_left_is_rounded_down_but_not_by_rounding_errors(gamma: float, rank: int, left: int) -> None:
    method = HetLora(SCALING, gamma=gamma)
    state = replace(
        method.init({"m": LoraFactors(torch.rand(rank, 9), torch.zeros(7, rank), 1.0)}), num_prunings={"a": 1}
    )
    assert ranks_of(method.broadcast_to(state, {"m": rank}, "a").trainable) == {left}


def test_clients_are_sent_the_penalty_unless_they_have_nothing_to_give_away() -> None:
    method = HetLora(SCALING, gamma=0.9, penalty=0.02)
    state = Case(HetLora, {}, SCALING).start()
    assert method.broadcast_to(state, all_modules(3), "a").tail_penalty == TailPenalty(0.02, 0.9)
    assert method.broadcast_to(state, all_modules(1), "a").tail_penalty is None
    assert HetLora(SCALING, penalty=0.0).broadcast(state, all_modules(3)).tail_penalty is None


def test_traits_say_whether_clients_can_lose_rank() -> None:
    assert (HetLora(SCALING).traits.per_client, HetLora(SCALING).traits.fewer_directions) == (True, True)
    plain = HetLora(SCALING, self_pruning=False).traits
    assert (plain.per_client, plain.fewer_directions) == (True, False)


def test_traits_say_that_norm_weights_do_not_count_examples() -> None:
    assert not HetLora(SCALING).traits.counts_examples
    assert HetLora(SCALING, norm_weights=False).traits.counts_examples


def test_ranks_above_the_servers_are_refused() -> None:
    state = Case(HetLora, {}, SCALING).start()
    with pytest.raises(AggregationError, match=r"1\.\.5, .*'attn\.k_proj'; got 6"):
        HetLora(SCALING).broadcast_to(state, all_modules(6), "a")
