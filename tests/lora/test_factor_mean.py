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
