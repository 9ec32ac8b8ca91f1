"""Norms of changes are those of dense matrices in numpy."""

import numpy as np
import pytest
import torch

from flexlora.lora.change import change_gram, change_norm, factor_change, product_change
from flexlora.lora.factors import FactorsError, LoraFactors

SHAPES = {"model.q": (7, 11), "model.up": (29, 13)}


def adapter(rank: int, seed: int, scaling: float = 1.7, near: dict[str, LoraFactors] | None = None, by: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module, (out_features, in_features) in SHAPES.items():
        A = by * torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
        B = by * torch.randn(out_features, rank, generator=generator, dtype=torch.float64)
        if near is not None:
            A, B = A + near[module].A, B + near[module].B
        made[module] = LoraFactors(A, B, scaling)
    return made


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.numpy().astype(np.float64) @ factors.A.numpy().astype(np.float64)


@pytest.mark.parametrize("by", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_norm_of_a_change_of_products_is_that_of_the_dense_matrices(rank: int, by: float) -> None:
    start = adapter(rank, 1)
    end = adapter(rank, 2, near=start, by=by)
    # In extended precision: where little moves, a difference of float64 products has lost the digits asked for.
    squares = np.longdouble(0)
    for module in SHAPES:
        products = [
            np.longdouble(one.scaling) * one.B.numpy().astype(np.longdouble) @ one.A.numpy().astype(np.longdouble)
            for one in (start[module], end[module])
        ]
        squares += ((products[1] - products[0]) ** 2).sum()
    assert change_norm(start, end, "products") == pytest.approx(float(np.sqrt(squares)), rel=1e-9)


def test_a_change_of_products_is_kept_by_factors_of_twice_the_rank() -> None:
    start, end = adapter(3, 1, 0.5), adapter(3, 2, 4.0)
    found = product_change(start["model.up"], end["model.up"])
    assert found.rank == 6
    np.testing.assert_allclose(dense(found), dense(end["model.up"]) - dense(start["model.up"]), atol=1e-12)


def test_the_norm_of_a_change_of_factors_is_that_of_all_their_entries() -> None:
    start, end = adapter(3, 1, 0.5), adapter(3, 2, 4.0)
    entries = []
    for module in SHAPES:
        entries += [(end[module].A - start[module].A).numpy().ravel()]
        entries += [(4.0 * end[module].B - 0.5 * start[module].B).numpy().ravel()]
        moved = factor_change(start[module], end[module])
        np.testing.assert_array_equal(moved.A.numpy(), (end[module].A - start[module].A).numpy())
    assert change_norm(start, end, "factors") == pytest.approx(np.linalg.norm(np.concatenate(entries)), rel=1e-12)


def test_what_did_not_move_has_norm_zero_and_so_has_another_gauge_of_one_product() -> None:
    start = adapter(4, 1)
    mixed = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    turned = {
        module: LoraFactors(torch.linalg.inv(mixed) @ one.A, one.B @ mixed, one.scaling)
        for module, one in start.items()
    }
    assert change_norm(start, start, "products") == change_norm(start, start, "factors") == 0.0
    assert change_norm(start, turned, "products") < 1e-11
    assert change_norm(start, turned, "factors") > 1


def test_a_module_that_did_not_come_back_did_not_move() -> None:
    start, end = adapter(2, 1), adapter(2, 2)
    only = {"model.q": end["model.q"]}
    assert change_norm(start, only, "products") == pytest.approx(
        np.linalg.norm(dense(end["model.q"]) - dense(start["model.q"])), rel=1e-12
    )


def test_a_change_without_its_start_is_refused() -> None:
    with pytest.raises(FactorsError, match=r"got none for 'model.up'"):
        change_norm({"model.q": adapter(2, 1)["model.q"]}, adapter(2, 2), "products")
    with pytest.raises(FactorsError, match="rank"):
        change_norm(adapter(2, 1), adapter(3, 1), "factors")


def test_inner_products_of_changes_at_mixed_ranks_are_those_of_dense_matrices() -> None:
    changes = [(adapter(rank, 10 + rank, 0.5 + rank), adapter(rank, 20 + rank, 0.5 + rank)) for rank in (1, 4, 2)]
    changes.append((adapter(3, 5), {"model.q": adapter(3, 6)["model.q"]}))
    vectors = []
    for start, end in changes:
        parts = [
            dense(end[module]) - dense(start[module]) if module in end else np.zeros(SHAPES[module])
            for module in SHAPES
        ]
        vectors.append(np.concatenate([part.ravel() for part in parts]))
    expected = np.stack(vectors) @ np.stack(vectors).T
    np.testing.assert_allclose(change_gram(changes).numpy(), expected, rtol=1e-9, atol=1e-9)
