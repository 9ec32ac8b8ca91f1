"""Rounds numbers at random to a few bits, so that their mean stays what they were.

A block of consecutive numbers shares a scale, the largest magnitude in it. With ``L = 2^(bits - 1) - 1``, a number
``x`` of a block with scale ``s`` travels as ``q = floor(L x / s + u)``, ``u`` uniform on [0, 1), and arrives as
``s q / L``: the grid point below or above, whose mean is ``x`` (as QSGD, arXiv:1610.02132, with the maximum
norm of a block in place of the 2-norm of all). The standard deviation is at most ``s / (2 L)``.
"""

# torch.from_numpy carries no type information.
# pyright: reportUnknownMemberType=false

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Bits = Literal[8, 4]

BLOCK = 128
"""Numbers that share a scale; 32 bits for each block are a quarter of a bit a number."""


@dataclass(frozen=True)
class Quantised:
    """A matrix of rounded numbers.

    Attributes:
        codes: uint8, flat, row by row: one number a byte, or two, the first in the lower half.
        scales: float32, ``[rows, blocks in a row]``.
    """

    codes: Tensor
    scales: Tensor


def quantised(values: Float[Tensor, "rows width"], bits: Bits, rng: np.random.Generator) -> Quantised:
    """Return ``values`` rounded at random; numbers that are not finite make the scale of their block so."""
    rows, width = values.shape
    levels = levels_of(bits)
    blocks = _blocks(width)
    padded = torch.nn.functional.pad(values.detach().to("cpu", torch.float32), (0, blocks * BLOCK - width))
    in_blocks = padded.reshape(rows, blocks, BLOCK)
    scales = in_blocks.abs().amax(dim=2)
    # A block of zeros stays zero, whatever it is divided by.
    steps = torch.where(scales > 0, scales, torch.ones_like(scales)) / levels
    draws = torch.from_numpy(rng.random((rows, blocks, BLOCK), dtype=np.float32))
    rounded = (in_blocks / steps[:, :, None] + draws).floor().nan_to_num(0.0).clamp(-levels, levels)
    codes = (rounded.to(torch.int16) + levels).to(torch.uint8).reshape(rows, -1)[:, :width].reshape(-1)
    return Quantised(codes.contiguous() if bits == 8 else _packed_pairs(codes), scales)


def restored(found: Quantised, rows: int, width: int, bits: Bits) -> Float[Tensor, "rows width"]:
    """Return the numbers that codes and scales stand for, float32.

    Args:
        found: In the shapes of ``quantised_shapes(rows, width, bits)``.
        rows: Of the matrix.
        width: Of the matrix.
        bits: Of a code.
    """
    levels = levels_of(bits)
    codes = found.codes if bits == 8 else _unpacked_pairs(found.codes, rows * width)
    numbers = (codes.reshape(rows, width).to(torch.int16) - levels).to(torch.float32)
    steps = (found.scales / levels).repeat_interleave(BLOCK, dim=1)[:, :width]
    return numbers * steps


def quantised_shapes(rows: int, width: int, bits: Bits) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of codes and scales of a matrix."""
    count = rows * width
    return (count if bits == 8 else (count + 1) // 2,), (rows, _blocks(width))


def levels_of(bits: Bits) -> int:
    """Return ``L``, the steps of the grid between zero and the largest number."""
    return 2 ** (bits - 1) - 1


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


def _packed_pairs(codes: Tensor) -> Tensor:
    even = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return even[0::2] | (even[1::2] << 4)


def _unpacked_pairs(codes: Tensor, count: int) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=1).reshape(-1)[:count]
