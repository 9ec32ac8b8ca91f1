import numpy as np
import pytest
import torch

from flexlora import FlexLoraError
from flexlora.lora.factors import LoraFactors, Scaling


def random_factors(rank: int = 3, scaling: float = 2.5, dtype: torch.dtype = torch.float32) -> LoraFactors:
    rng = torch.Generator().manual_seed(rank)
    return LoraFactors(
        torch.randn(rank, 7, generator=rng).to(dtype), torch.randn(11, rank, generator=rng).to(dtype), scaling
    )


def numpy_delta(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


@pytest.mark.parametrize(
    ("policy", "rank", "expected"),
    [("constant_alpha", 8, 2.0), ("constant_ratio", 8, 16.0), ("rslora", 64, 2.0), ("constant_alpha", 1, 16.0)],
)
def test_scaling_follows_its_policy(policy, rank, expected):
    assert Scaling(policy, 16.0)(rank) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_delta_and_norm_agree_with_numpy_in_every_dtype(dtype):
    factors = random_factors(dtype=dtype)
    assert factors.delta().dtype == torch.float64
    np.testing.assert_allclose(factors.delta().numpy(), numpy_delta(factors), rtol=1e-12)
    assert factors.norm() == pytest.approx(np.linalg.norm(numpy_delta(factors)), rel=1e-12)


def test_norm_keeps_changes_that_nearly_cancel():
    column = torch.ones(5, 1, dtype=torch.float64)
    factors = LoraFactors(
        torch.tensor([[1.0, 0.0], [1.0, 1e-12]], dtype=torch.float64), torch.cat([column, -column], 1), 1.0
    )
    assert factors.norm() == pytest.approx(5**0.5 * 1e-12, rel=1e-3)


def test_padding_keeps_the_change_and_truncation_undoes_it():
    factors = random_factors()
    padded = factors.pad(8)
    assert padded.rank == 8
    np.testing.assert_array_equal(padded.delta().numpy(), factors.delta().numpy())
    assert torch.equal(padded.truncate(3).A, factors.A)
    assert torch.equal(padded.truncate(3).B, factors.B)


def test_another_scaling_leaves_the_change_and_a_as_they_are():
    factors = random_factors()
    other = factors.with_scaling(0.3)
    assert other.scaling == 0.3
    assert torch.equal(other.A, factors.A)
    np.testing.assert_allclose(other.delta().numpy(), factors.delta().numpy(), atol=1e-6)


def test_a_copy_shares_no_memory_and_no_graph_with_its_source():
    factors = LoraFactors(torch.ones(1, 2, requires_grad=True), torch.ones(3, 1, requires_grad=True), 1.0)
    copy = factors.to(torch.float32)
    with torch.no_grad():
        factors.A.zero_()
    assert not copy.A.requires_grad
    assert copy.A.tolist() == [[1, 1]]


def test_impossible_ranks_and_scalings_are_named():
    factors = random_factors()
    with pytest.raises(FlexLoraError, match=r"at least 3; got 2"):
        factors.pad(2)
    with pytest.raises(FlexLoraError, match=r"0\.\.3, the rank of the factors; got 4"):
        factors.truncate(4)
    with pytest.raises(ValueError, match="scaling must not be 0"):
        factors.with_scaling(0.0)


def test_a_copy_is_stored_row_by_row_whatever_it_was_made_from():
    factors = random_factors()
    turned = LoraFactors(factors.A.T.contiguous().T, torch.cat([factors.B, factors.B], 1)[:, :3], factors.scaling)
    copy = turned.to(torch.float64)
    assert (copy.A.stride(), copy.B.stride()) == ((7, 1), (3, 1))
    assert torch.equal(copy.A, factors.A.double())
    assert torch.equal(copy.B, factors.B.double())
