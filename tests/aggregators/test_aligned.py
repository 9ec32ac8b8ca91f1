"""Aligned FlexLoRA against numpy: what it averages, what it keeps, and what clients receive."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from flexlora.aggregators.aligned import Aligned, AlignedState
from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.fedit import FedIt
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"a": (9, 6), "b": (8, 13)}
RANK = 4
RANKS = (1, 2, 4, 4)
WEIGHTS = (3.0, 1.0, 2.0, 0.5)
SCALING = Scaling("rslora", 2.0)


def initial() -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: LoraFactors(torch.randn(RANK, width, generator=generator), torch.zeros(height, RANK), SCALING(RANK))
        for name, (height, width) in SHAPES.items()
    }


def all_ranks(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def trained(adapter: AdapterState, seed: int, size: float = 0.1) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)

    def moved(factor: torch.Tensor) -> torch.Tensor:
        return factor + size * torch.randn(factor.shape, generator=generator)

    return {name: LoraFactors(moved(one.A), moved(one.B), one.scaling) for name, one in adapter.items()}


def round_of(method: Any, state: Any, seed: int, ranks: tuple[int, ...] = RANKS, size: float = 0.1) -> list[Update]:
    return [
        Update(str(i), trained(method.broadcast(state, all_ranks(rank)).trainable, 100 * seed + i, size), WEIGHTS[i])
        for i, rank in enumerate(ranks)
    ]


def change(broadcast: Broadcast) -> dict[str, np.ndarray]:
    found = {name: np.zeros(SHAPES[name]) for name in SHAPES}
    for branch in (broadcast.trainable, broadcast.frozen or {}):
        for name, one in branch.items():
            found[name] += one.scaling * one.B.double().numpy() @ one.A.double().numpy()
    return found


def model(method: Aligned, state: AlignedState) -> dict[str, np.ndarray]:
    return change(method.broadcast(state, all_ranks(RANK)))


def close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], atol: float = 1e-5) -> None:
    for name in SHAPES:
        np.testing.assert_allclose(found[name], expected[name], atol=atol)


def after(method: Aligned, rounds: int) -> AlignedState:
    state = method.init(initial())
    for number in range(rounds):
        state = method.aggregate(state, round_of(method, state, number + 1))
    return state


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_product_of_the_mean_factors_is_what_the_next_round_starts_from(exponent: float) -> None:
    method = Aligned(SCALING, holder_exponent=exponent)
    state = after(method, 2)
    sent = {rank: method.broadcast(state, all_ranks(rank)).trainable for rank in set(RANKS)}
    updates = round_of(method, state, 9)
    found = model(method, method.aggregate(state, updates))
    total = sum(WEIGHTS)
    expected = {}
    for name in SHAPES:
        A = sent[RANK][name].A.double().numpy().copy()
        B = sent[RANK][name].scaling * sent[RANK][name].B.double().numpy()
        A0, B0 = A.copy(), B.copy()
        for j in range(RANK):
            cover = sum(w for w, rank in zip(WEIGHTS, RANKS, strict=True) if rank > j) / total
            for update, rank in zip(updates, RANKS, strict=True):
                if rank > j:
                    own = update.payload[name]
                    share = update.weight / total / cover**exponent
                    A[j] += share * (own.A[j].double().numpy() - A0[j])
                    B[:, j] += share * (own.scaling * own.B[:, j].double().numpy() - B0[:, j])
        expected[name] = B @ A
    close(found, expected)


@pytest.mark.parametrize("every", [1, 3, None])
@pytest.mark.parametrize("split", ["b", "balanced"])
def test_clients_that_echo_change_nothing_for_ten_rounds(every: int | None, split: Any) -> None:
    method = Aligned(SCALING, decompose_every=every, split=split)
    state = after(method, 2)
    expected = model(method, state)
    for _ in range(10):
        echoes = [
            Update(str(i), method.broadcast(state, all_ranks(rank)).trainable, WEIGHTS[i])
            for i, rank in enumerate(RANKS)
        ]
        state = method.aggregate(state, echoes)
    close(model(method, state), expected)


def test_every_rank_runs_the_same_model_when_the_tail_is_folded_in() -> None:
    method = Aligned(SCALING)
    state = after(method, 2)
    expected = model(method, state)
    for rank in range(1, RANK + 1):
        broadcast = method.broadcast(state, all_ranks(rank))
        assert {one.rank for one in broadcast.trainable.values()} == {rank}
        close(change(broadcast), expected)


def test_without_folding_a_client_gets_the_best_approximation_of_its_rank() -> None:
    method = Aligned(SCALING, fold_tail=False)
    state = after(method, 2)
    full = model(method, state)
    for rank in range(1, RANK + 1):
        found = change(method.broadcast(state, all_ranks(rank)))
        for name, whole in full.items():
            U, S, Vh = np.linalg.svd(whole)
            np.testing.assert_allclose(found[name], (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=1e-5)


def test_a_module_that_a_client_lacks_is_in_its_frozen_branch() -> None:
    method = Aligned(SCALING)
    state = after(method, 2)
    broadcast = method.broadcast(state, {"b": 2})
    assert list(broadcast.trainable) == ["b"]
    close(change(broadcast), model(method, state))


def test_at_one_rank_the_first_round_is_that_of_fedit() -> None:
    aligned, fedit = Aligned(SCALING), FedIt(SCALING)
    ranks = (RANK,) * 4
    state, other = aligned.init(initial()), fedit.init(initial())
    found = model(aligned, aligned.aggregate(state, round_of(aligned, state, 1, ranks)))
    close(found, change(fedit.broadcast(fedit.aggregate(other, round_of(fedit, other, 1, ranks)), all_ranks(RANK))))


def test_noise_of_second_order_falls_with_the_square_of_the_number_of_clients() -> None:
    # The mean of products keeps mean(dB_i dA_i), whose norm falls with the root of the number of clients only.
    method = Aligned(SCALING)
    start = after(method, 3)

    def second_order(num_clients: int) -> tuple[float, float]:
        sent = method.broadcast(start, all_ranks(RANK)).trainable
        updates = [Update(str(i), trained(sent, 1000 + i), 1.0) for i in range(num_clients)]
        scale = sent["b"].scaling
        dA = np.array([u.payload["b"].A.double().numpy() - sent["b"].A.double().numpy() for u in updates])
        dB = scale * np.array([u.payload["b"].B.double().numpy() - sent["b"].B.double().numpy() for u in updates])
        A0, B0 = sent["b"].A.double().numpy(), scale * sent["b"].B.double().numpy()
        first = B0 @ A0 + B0 @ dA.mean(0) + dB.mean(0) @ A0
        ours = model(method, method.aggregate(start, updates))["b"] - first
        products = np.mean([b @ a for a, b in zip(dA, dB, strict=True)], axis=0)
        return float(np.linalg.norm(ours)), float(np.linalg.norm(products))

    few, many = second_order(16), second_order(1024)
    assert few[0] / many[0] == pytest.approx(64, rel=0.3)  # both factors average: 1024 / 16
    assert few[1] / many[1] == pytest.approx(8, rel=0.3)  # products average as one: its root


def test_a_server_step_of_half_moves_half_as_far_in_each_factor() -> None:
    whole, half = (
        Aligned(SCALING, decompose_every=None),
        Aligned(SCALING, decompose_every=None, server_learning_rate=0.5),
    )
    state = after(whole, 1)
    updates = round_of(whole, state, 5)
    moved, partly = whole.aggregate(state, updates), half.aggregate(state, updates)
    for name in SHAPES:
        full_step = (moved.factors[name].A - state.factors[name].A).numpy()
        np.testing.assert_allclose((partly.factors[name].A - state.factors[name].A).numpy(), full_step / 2, rtol=1e-9)


def test_ranks_above_the_servers_are_refused() -> None:
    method = Aligned(SCALING)
    state = method.init(initial())
    with pytest.raises(AggregationError, match=r"ranks in 1\.\.4"):
        method.broadcast(state, all_ranks(5))
    large = {name: LoraFactors(torch.ones(5, w), torch.ones(h, 5), 1.0) for name, (h, w) in SHAPES.items()}
    with pytest.raises(AggregationError, match=r"ranks in 1\.\.4"):
        method.aggregate(state, [Update("x", large, 1.0)])
