"""Expected values come from numpy sums in float64."""

import numpy as np
import pytest
import torch

from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.lora.global_change import (
    adding_products,
    branch_factors,
    folded,
    global_change_of,
    sum_products,
    truncated,
)
from flexlora.lora.product import ProductError, ProductSum, spectrum_of

SHAPES = {"m": (7, 11), "n": (9, 5)}
SCALING = Scaling("rslora", 4.0)


def adapter(rank: int, seed: int, modules: str = "mn") -> dict[str, LoraFactors]:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, SHAPES[module][1], generator=rng),
            torch.randn(SHAPES[module][0], rank, generator=rng),
            SCALING(rank),
        )
        for module in modules
    }


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


def test_products_are_summed_with_weights_and_modules_that_are_missing_are_zero():
    updates = [(adapter(2, 1), 3.0), (adapter(1, 2, "n"), 5.0)]
    sums, total = sum_products(SHAPES, iter(updates))
    assert total == 8.0
    found = truncated(sums, None, total)
    np.testing.assert_allclose(found["m"].delta().numpy(), 3 / 8 * dense(updates[0][0]["m"]), atol=1e-13)
    expected = 3 / 8 * dense(updates[0][0]["n"]) + 5 / 8 * dense(updates[1][0]["n"])
    np.testing.assert_allclose(found["n"].delta().numpy(), expected, atol=1e-13)


def test_updates_pass_on_while_their_products_are_added():
    sums = {module: ProductSum(*shape) for module, shape in SHAPES.items()}
    updates = [(adapter(2, 1), 3.0), (adapter(1, 2, "n"), 5.0)]
    seen = [(sums["n"].total_rank, weight) for _, weight in adding_products(sums, iter(updates))]
    assert seen == [(2, 3.0), (3, 5.0)] and sums["m"].total_rank == 2


def test_folding_keeps_every_direction_up_to_the_shorter_side():
    branch, expected = global_change_of(adapter(2, 0)).spectra, {m: dense(f) for m, f in adapter(2, 0).items()}
    for seed in range(1, 4):
        sums, total = sum_products(SHAPES, [(adapter(2, seed), 3.0)])
        branch = folded(branch, sums, 2 * total)
        for module, shape in SHAPES.items():
            expected[module] += dense(adapter(2, seed)[module]) / 2
            assert len(branch[module].S) == min(2 * (seed + 1), *shape)
            np.testing.assert_allclose(branch[module].delta().numpy(), expected[module], atol=1e-12)


def test_truncation_is_module_by_module_and_says_what_it_lost():
    sums, _ = sum_products(SHAPES, [(adapter(4, 1), 1.0)])
    found = truncated(sums, {"m": 1, "n": 3})
    for module, rank in (("m", 1), ("n", 3)):
        S = np.linalg.svd(dense(adapter(4, 1)[module]), compute_uv=False)
        assert len(found[module].S) == rank
        assert found[module].tail == pytest.approx(np.linalg.norm(S[rank:]))


def test_slices_are_best_approximations_and_fresh_factors_have_no_change():
    change = global_change_of(adapter(4, 1))
    assert change.shapes == SHAPES and change.server_ranks == {"m": 4, "n": 4}
    U, S, Vh = np.linalg.svd(dense(adapter(4, 1)["m"]))
    (factors,) = change.slices({"m": 2}, SCALING).values()
    np.testing.assert_allclose(dense(factors), (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-5 * S[0])
    fresh = change.fresh({"n": 3, "m": 6}, SCALING)
    assert list(fresh) == ["m", "n"]
    assert torch.equal(fresh["n"].A, adapter(4, 1)["n"].A[:3]) and not fresh["n"].B.any()
    assert fresh["m"].scaling == SCALING(6) and fresh["m"].A.any(dim=1).all() and fresh["m"].A.dtype == torch.float32


def test_a_branch_leaves_out_modules_without_a_change():
    nothing = spectrum_of(LoraFactors(torch.ones(2, 5), torch.zeros(9, 2), 1.0))
    change = global_change_of(adapter(2, 1)).spectra["m"]
    assert branch_factors({"n": nothing}) is None
    branch = branch_factors({"m": change, "n": nothing})
    assert branch is not None and list(branch) == ["m"] and branch["m"].scaling == 1.0
    np.testing.assert_allclose(dense(branch["m"]), dense(adapter(2, 1)["m"]), atol=1e-5)


def test_values_that_are_not_finite_are_refused():
    broken = adapter(2, 1)
    broken["m"].A[0, 0] = torch.nan
    sums, total = sum_products(SHAPES, [(broken, 1.0)])
    with pytest.raises(ProductError, match="must be finite"):
        folded(global_change_of(adapter(2, 0)).spectra, sums, total)
