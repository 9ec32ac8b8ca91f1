"""Expected values come from numpy: factors padded with zeros to the server's rank and averaged."""

import numpy as np
import pytest
import torch

from flexlora.lora.factor_mean import mean_factors
from flexlora.lora.factors import FactorsError, LoraFactors

SHAPES = {"layers.0.q": (5, 7), "layers.0.up": (9, 4)}


def draw(
    ranks: dict[str, int], seed: int, scaling: float, dtype: torch.dtype = torch.float32
) -> dict[str, LoraFactors]:
    rng = np.random.default_rng(seed)
    drawn: dict[str, LoraFactors] = {}
    for module, rank in ranks.items():
        out_features, in_features = SHAPES[module]
        A = torch.tensor(rng.standard_normal((rank, in_features))).to(dtype)
        B = torch.tensor(rng.standard_normal((out_features, rank))).to(dtype)
        drawn[module] = LoraFactors(A, B, scaling)
    return drawn


def padded_means(start: LoraFactors, updates: list[tuple[LoraFactors | None, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return ``sum w pad(A) / sum w`` and ``sum w pad(s B) / (s0 sum w)``; None stands for an update without them."""
    A, B = np.zeros(start.A.shape), np.zeros(start.B.shape)
    weights = sum(weight for _, weight in updates)
    for factors, weight in updates:
        if factors is not None:
            ratio = factors.scaling / start.scaling
            extra = start.rank - factors.rank
            A += weight / weights * np.pad(factors.A.double().numpy(), ((0, extra), (0, 0)))
            B += weight / weights * np.pad(ratio * factors.B.double().numpy(), ((0, 0), (0, extra)))
    return A, B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_any_rank_are_averaged_as_if_padded_with_zeros(dtype: torch.dtype) -> None:
    start = draw({"layers.0.q": 6, "layers.0.up": 4}, 0, 1.0, torch.float64)
    updates = [
        (draw({"layers.0.q": 6, "layers.0.up": 1}, 1, 16 / 6, dtype), 3.0),
        (draw({"layers.0.q": 2, "layers.0.up": 4}, 2, 8.0, dtype), 1.0),
        (draw({"layers.0.q": 3}, 3, 5.0, dtype), 0.5),
    ]
    mean = mean_factors(start, updates)
    assert list(mean) == list(start)
    for module, factors in mean.items():
        A, B = padded_means(start[module], [(adapter.get(module), weight) for adapter, weight in updates])
        np.testing.assert_allclose(factors.A.numpy(), A, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(factors.B.numpy(), B, rtol=1e-14, atol=1e-15)
        assert (factors.A.dtype, factors.B.dtype, factors.scaling) == (torch.float64, torch.float64, 1.0)


def test_scalings_of_clients_are_taken_over_into_that_of_the_server() -> None:
    start = draw(dict.fromkeys(SHAPES, 3), 0, 0.7, torch.float64)
    updates = [(draw(dict.fromkeys(SHAPES, 3), seed, 1.9), weight) for seed, weight in ((1, 2.0), (2, 5.0))]
    for module, factors in mean_factors(start, updates).items():
        A, B = padded_means(start[module], [(adapter[module], weight) for adapter, weight in updates])
        np.testing.assert_allclose(factors.A.numpy(), A, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(factors.B.numpy(), B, rtol=1e-14, atol=1e-15)
        assert factors.scaling == 0.7


def test_directions_that_no_update_has_stay_as_they_were() -> None:
    start = draw({"layers.0.q": 6, "layers.0.up": 4}, 0, 1.0, torch.float64)
    mean = mean_factors(start, [(draw({"layers.0.q": 2}, 1, 8.0), 1.0), (draw({"layers.0.q": 4}, 2, 8.0), 2.0)])
    assert torch.equal(mean["layers.0.q"].A[4:], start["layers.0.q"].A[4:])
    assert torch.equal(mean["layers.0.q"].B[:, 4:], start["layers.0.q"].B[:, 4:])
    assert not torch.equal(mean["layers.0.q"].A[2:4], start["layers.0.q"].A[2:4])
    assert torch.equal(mean["layers.0.up"].A, start["layers.0.up"].A)
    assert torch.equal(mean["layers.0.up"].B, start["layers.0.up"].B)


def test_one_update_of_full_rank_is_its_own_mean_to_the_bit() -> None:
    start = draw(dict.fromkeys(SHAPES, 3), 0, 2.0, torch.float64)
    update = draw(dict.fromkeys(SHAPES, 3), 1, 2.0)
    for module, factors in mean_factors(start, [(update, 4.0)]).items():
        assert torch.equal(factors.A, update[module].A.double())
        assert torch.equal(factors.B, update[module].B.double())


def test_updates_are_read_one_at_a_time_and_nothing_given_is_changed() -> None:
    start = draw(dict.fromkeys(SHAPES, 3), 0, 1.0, torch.float64)
    update = draw(dict.fromkeys(SHAPES, 3), 1, 1.0, torch.float64)
    before = {
        id(factor): factor.clone() for own in (start, update) for one in own.values() for factor in (one.A, one.B)
    }
    mean = mean_factors(start, iter([(update, 1.0), (update, 2.0)]))
    for factors in mean.values():
        factors.A.fill_(9.0)
        factors.B.fill_(9.0)
    for own in (start, update):
        for factors in own.values():
            assert torch.equal(factors.A, before[id(factors.A)]) and torch.equal(factors.B, before[id(factors.B)])


def test_what_the_server_has_no_place_for_is_refused() -> None:
    start = draw({"layers.0.q": 2}, 0, 1.0, torch.float64)
    with pytest.raises(FactorsError, match=r"layers\.0\.q: rank must be in 0\.\.2, .*; got 3"):
        mean_factors(start, [(draw({"layers.0.q": 3}, 1, 1.0), 1.0)])
    with pytest.raises(FactorsError, match=r"layers\.0\.up: rank must be in 0\.\.0, .*; got 1"):
        mean_factors(start, [(draw({"layers.0.up": 1}, 1, 1.0), 1.0)])
    with pytest.raises(FactorsError, match="must add up to more than 0; got 0"):
        mean_factors(start, [(draw({"layers.0.q": 2}, 1, 1.0), 0.0)])


def holder_means(start: LoraFactors, updates: list[tuple[LoraFactors, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of row ``j`` of ``A`` and column ``j`` of ``s B / s0`` over those who have them, one by one."""
    A, B = start.A.double().numpy().copy(), start.B.double().numpy().copy()
    for j in range(start.rank):
        held = [(factors, weight) for factors, weight in updates if factors.rank > j]
        if held:
            weights = [weight for _, weight in held]
            A[j] = np.average([factors.A[j].double().numpy() for factors, _ in held], axis=0, weights=weights)
            columns = [factors.scaling / start.scaling * factors.B[:, j].double().numpy() for factors, _ in held]
            B[:, j] = np.average(columns, axis=0, weights=weights)
    return A, B


def test_means_over_holders_are_taken_direction_by_direction() -> None:
    start = draw({"layers.0.q": 6, "layers.0.up": 4}, 0, 1.3, torch.float64)
    updates = [
        (draw({"layers.0.q": 5, "layers.0.up": 1}, 1, 16 / 6), 3.0),
        (draw({"layers.0.q": 2, "layers.0.up": 3}, 2, 8.0), 1.0),
        (draw({"layers.0.q": 3}, 3, 5.0), 0.5),
    ]
    for module, factors in mean_factors(start, updates, over="holders").items():
        A, B = holder_means(start[module], [(one[module], weight) for one, weight in updates if module in one])
        np.testing.assert_allclose(factors.A.numpy(), A, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(factors.B.numpy(), B, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("over", ["all", "holders"])
def test_one_factor_may_be_averaged_alone(over) -> None:
    start = draw({"layers.0.q": 6, "layers.0.up": 4}, 0, 1.0, torch.float64)
    updates = [(draw({"layers.0.q": rank, "layers.0.up": 1}, rank, 2.0), float(rank)) for rank in (2, 5)]
    both = mean_factors(start, updates, over=over)
    only_A, only_B = (mean_factors(start, updates, over=over, averaged=one) for one in ("A", "B"))
    for module in start:
        assert torch.equal(only_A[module].A, both[module].A) and torch.equal(only_A[module].B, start[module].B)
        assert torch.equal(only_B[module].B, both[module].B) and torch.equal(only_B[module].A, start[module].A)
        assert only_A[module].B is not start[module].B and only_B[module].A is not start[module].A


def test_importance_weighs_updates_module_by_module() -> None:
    start = draw({"layers.0.q": 4, "layers.0.up": 4}, 0, 1.0, torch.float64)
    updates = [
        (draw({"layers.0.q": 4, "layers.0.up": 1}, 1, 0.5), 1.0),
        (draw({"layers.0.q": 2}, 2, 8.0), 2.0),
    ]
    mean = mean_factors(start, updates, importance=LoraFactors.norm)
    for module in start:
        # The update that lacks a module has no norm there.
        norms = [
            weight
            * np.linalg.norm(one[module].scaling * one[module].B.double().numpy() @ one[module].A.double().numpy())
            for one, weight in updates
            if module in one
        ]
        A, B = padded_means(start[module], [(one[module], w) for (one, _), w in zip(updates, norms, strict=False)])
        covered = max(one[module].rank for one, _ in updates if module in one)
        np.testing.assert_allclose(mean[module].A.numpy()[:covered], A[:covered], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(mean[module].B.numpy()[:, :covered], B[:, :covered], rtol=1e-12, atol=1e-13)


def test_a_module_in_which_every_importance_is_zero_stays() -> None:
    start = draw({"layers.0.q": 2}, 0, 1.0, torch.float64)
    mean = mean_factors(start, [(draw({"layers.0.q": 2}, 1, 1.0), 1.0)], importance=lambda _: 0.0)
    assert torch.equal(mean["layers.0.q"].A, start["layers.0.q"].A)
    assert torch.equal(mean["layers.0.q"].B, start["layers.0.q"].B)


@pytest.mark.parametrize("over", ["all", "holders"])
def test_an_update_of_weight_zero_changes_no_direction_that_it_alone_has(over) -> None:
    start = draw({"layers.0.q": 4}, 0, 1.0, torch.float64)
    updates = [(draw({"layers.0.q": 2}, 1, 1.0), 1.0), (draw({"layers.0.q": 4}, 2, 1.0), 0.0)]
    mean = mean_factors(start, updates, over=over)["layers.0.q"]
    assert torch.equal(mean.A[2:], start["layers.0.q"].A[2:])
    assert torch.equal(mean.B[:, 2:], start["layers.0.q"].B[:, 2:])
