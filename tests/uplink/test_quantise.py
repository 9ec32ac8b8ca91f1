"""Rounding at random: on the grid, right in the mean, in the bytes that are stated."""

import numpy as np
import pytest
import torch

from flexlora.uplink.quantise import BLOCK, Quantised, quantised, quantised_shapes, restored


def numbers(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (2, BLOCK), (5, 2 * BLOCK + 7), (7, 33)])
def test_each_number_arrives_as_a_neighbour_on_the_grid_of_its_block(bits, rows, width):
    values = numbers(rows, width)
    found = quantised(values, bits, np.random.default_rng(1))
    assert (tuple(found.codes.shape), tuple(found.scales.shape)) == quantised_shapes(rows, width, bits)
    assert found.codes.dtype == torch.uint8 and found.scales.dtype == torch.float32
    arrived = restored(found, rows, width, bits).numpy().astype(np.float64)
    for row in range(rows):
        for start in range(0, width, BLOCK):
            own = values[row, start : start + BLOCK].numpy().astype(np.float64)
            step = np.abs(own).max() / (2 ** (bits - 1) - 1)
            got = arrived[row, start : start + BLOCK]
            assert np.abs(got - own).max() < step * (1 + 1e-5)
            assert np.allclose(got / step, np.round(got / step), atol=1e-3)
            # The largest number of a block is a point of the grid.
            assert got[np.abs(own).argmax()] == pytest.approx(own[np.abs(own).argmax()], rel=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_mean_of_many_roundings_is_the_number(bits):
    values, rng = numbers(2, 40), np.random.default_rng(2)
    draws = np.stack([restored(quantised(values, bits, rng), 2, 40, bits).numpy() for _ in range(4000)])
    step = values.abs().amax(dim=1, keepdim=True).numpy() / (2 ** (bits - 1) - 1)
    # At most half a step of deviation, so five standard errors of the mean are this.
    assert (np.abs(draws.mean(axis=0) - values.numpy()) < 5 * step / 2 / 4000**0.5).all()
    position = values.numpy() / step - np.floor(values.numpy() / step)
    assert np.allclose(draws.std(axis=0) / step, np.sqrt(position * (1 - position)), atol=0.04)


def test_zeros_stay_zero_and_tiny_or_huge_numbers_keep_their_size():
    values = torch.zeros(3, 4)
    values[1], values[2] = 1e-38, 3e38
    for bits in (8, 4):
        arrived = restored(quantised(values, bits, np.random.default_rng(0)), 3, 4, bits)
        assert torch.equal(arrived[0], torch.zeros(4))
        assert arrived[1:].numpy() == pytest.approx(values[1:].numpy(), rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_as_such(bad):
    values = numbers(2, 5)
    values[1, 2] = bad
    arrived = restored(quantised(values, 8, np.random.default_rng(0)), 2, 5, 8)
    assert arrived[0].isfinite().all() and not arrived[1].isfinite().any()


def test_two_codes_of_four_bits_share_a_byte_the_first_in_the_lower_half():
    found = Quantised(torch.tensor([0x2E, 0x07], dtype=torch.uint8), torch.tensor([[7.0]]))
    # 14, 2 and 7 are 7, -5 and 0 steps of 7/7.
    assert restored(found, 1, 3, 4).tolist() == [[7.0, -5.0, 0.0]]
    assert restored(Quantised(torch.tensor([254, 0], dtype=torch.uint8), torch.tensor([[1.0]])), 1, 2, 8).tolist() == [
        [1.0, -1.0]
    ]
