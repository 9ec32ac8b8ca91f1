"""Expected values come from numpy: factors padded, averaged and cut by hand."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.zero_pad import ZeroPad
from flexlora.federation.messages import Update
from flexlora.lora.factors import LoraFactors, Scaling

SCALING = Scaling("constant_alpha", 16.0)
SERVER_RANK = 6


def factors(rank: int, seed: int) -> LoraFactors:
    rng = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, 9, generator=rng), torch.randn(5, rank, generator=rng), SCALING(rank))


def test_padded_factors_are_averaged_with_b_in_the_scaling_of_its_client():
    aggregator = ZeroPad(scaling=SCALING)
    updates = [Update(str(rank), {"m": factors(rank, rank)}, weight) for rank, weight in ((2, 1.0), (4, 3.0), (6, 4.0))]
    state = aggregator.aggregate(aggregator.init({"m": factors(SERVER_RANK, 0)}), updates)
    A, B = np.zeros((SERVER_RANK, 9)), np.zeros((5, SERVER_RANK))
    for update in updates:
        f = update.payload["m"]
        A[: f.rank] += update.weight / 8 * f.A.double().numpy()
        B[:, : f.rank] += update.weight / 8 * 16 / f.rank * f.B.double().numpy()
    for rank in range(1, SERVER_RANK + 1):
        found = aggregator.broadcast(state, {"m": rank}).trainable["m"]
        np.testing.assert_allclose(found.A.numpy(), A[:rank], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(16 / rank * found.B.numpy(), B[:, :rank], rtol=1e-5, atol=1e-6)


def test_an_echo_decays_each_direction_by_its_coverage_squared():
    aggregator = ZeroPad(scaling=SCALING)
    state = aggregator.init({"m": factors(SERVER_RANK, 0)})
    before = state.adapter["m"]
    cohort = [(2, 1.0), (4, 2.0), (6, 1.0)]
    updates = [Update(None, aggregator.broadcast(state, {"m": rank}).trainable, weight) for rank, weight in cohort]
    after = aggregator.aggregate(state, updates).adapter["m"]
    for j, coverage in enumerate([1, 1, 0.75, 0.75, 0.25, 0.25]):
        expected = coverage**2 * torch.outer(before.B[:, j], before.A[j])
        torch.testing.assert_close(torch.outer(after.B[:, j], after.A[j]), expected, rtol=1e-6, atol=1e-6)


def test_what_nobody_covers_is_kept_as_it_was():
    aggregator = ZeroPad(scaling=SCALING)
    state = aggregator.init({"m": factors(SERVER_RANK, 0), "unused": factors(SERVER_RANK, 1)})
    after = aggregator.aggregate(state, [Update("small", {"m": factors(2, 2)}, 1.0)])
    assert torch.equal(after.adapter["m"].A[2:], state.adapter["m"].A[2:])
    assert torch.equal(after.adapter["m"].B[:, 2:], state.adapter["m"].B[:, 2:])
    assert torch.equal(after.adapter["unused"].A, state.adapter["unused"].A)


def test_ranks_above_the_servers_are_refused():
    aggregator = ZeroPad(scaling=SCALING)
    state = aggregator.init({"m": factors(SERVER_RANK, 0)})
    with pytest.raises(AggregationError, match=r"1\.\.6, the rank of the server's adapter in 'm'; got 7"):
        aggregator.aggregate(state, [Update("large", {"m": factors(7, 2)}, 1.0)])
    with pytest.raises(AggregationError, match=r"largest rank in clients\.distribution"):
        aggregator.broadcast(state, {"m": 7})


def test_the_spectrum_is_the_decomposition_of_the_averaged_product():
    aggregator = ZeroPad(scaling=SCALING)
    updates = [Update(str(i), {"m": factors(SERVER_RANK, i)}, 1.0 + i) for i in range(3)]
    state = aggregator.aggregate(aggregator.init({"m": factors(SERVER_RANK, 9)}), updates)
    A = sum(u.weight / 6 * u.payload["m"].A.double().numpy() for u in updates)
    B = sum(u.weight / 6 * u.payload["m"].B.double().numpy() for u in updates)
    W = SCALING(SERVER_RANK) * B @ A
    spectrum = aggregator.spectra(state)["m"]
    S = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(spectrum.S.numpy(), S[: len(spectrum.S)], rtol=1e-12)
    np.testing.assert_allclose(spectrum.delta().numpy(), W, atol=1e-12 * S[0])
    assert spectrum.tail < 1e-12 * S[0]  # the product has no more directions than the server keeps
