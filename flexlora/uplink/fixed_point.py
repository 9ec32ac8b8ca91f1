"""Turns numbers into integers modulo a power of two, so that their sum is exact and can be masked.

A number ``x`` of a part with the public bound ``largest`` becomes ``q = floor(x L / largest + u)``, ``u`` uniform in 0
to 1: rounding is unbiased, and its error on the sum of ``n`` clients has a standard deviation of at most ``sqrt(n)
largest / (2 L)``. With ``L = floor((2^(bits - 1) - 1) / n)`` no sum of ``n`` terms can leave the modulus ``2^bits``.
Counts are integers as they are, modulo 2^32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np
import numpy.typing as npt

from flexlora.errors import FlexLoraError
from flexlora.uplink.mask_keys import Words

WordBits = Literal[16, 24, 32]
_COUNT_BYTES = 4

Numbers = npt.NDArray[np.float64]


class FixedPointError(FlexLoraError, ValueError):
    """Numbers that have no place in the integers that were agreed on."""


@dataclass(frozen=True)
class VectorPart:
    """Numbers of one kind.

    Attributes:
        name: Of the part, once per layout.
        size: How many numbers.
        largest: Public bound of their absolute values; None for counts.
    """

    name: str
    size: int
    largest: float | None = None


@dataclass(frozen=True)
class Layout:
    """What a vector of integers is made of: counts first, then all other parts.

    Attributes:
        counts: Parts that hold counts.
        values: Parts that hold numbers.
        num_clients: Most vectors that are added up.
        word_bits: Bits of a value on its way.
    """

    counts: Sequence[VectorPart]
    values: Sequence[VectorPart]
    num_clients: int
    word_bits: WordBits = 32

    def __post_init__(self) -> None:
        """Refuse layouts that leave no room for the sum.

        Raises:
            FixedPointError: Naming what must change.
        """
        if self.levels < 1:
            raise FixedPointError(
                f"words of {self.word_bits} bits must hold the sum of {self.num_clients} clients; they cannot: use "
                "privacy.secure_sum.word_bits=32 or a smaller cohort"
            )
        for part in self.values:
            if part.largest is None or not (isfinite(part.largest) and part.largest > 0):
                raise FixedPointError(f"{part.name}: a bound must be positive and finite; got {part.largest}")

    @property
    def levels(self) -> int:
        """Largest integer that one client may send for a value."""
        return (2 ** (self.word_bits - 1) - 1) // self.num_clients

    @property
    def most_counted(self) -> int:
        """Largest count that one client may send."""
        return (2**31 - 1) // self.num_clients

    @property
    def num_counts(self) -> int:
        """Number of words that hold counts."""
        return sum(part.size for part in self.counts)

    @property
    def num_words(self) -> int:
        """Number of words."""
        return self.num_counts + sum(part.size for part in self.values)

    @property
    def num_bytes(self) -> int:
        """Size of the vector on its way."""
        return _COUNT_BYTES * self.num_counts + self.word_bits // 8 * (self.num_words - self.num_counts)


def num_clipped(layout: Layout, values: Mapping[str, Numbers]) -> int:
    """Return how many values are beyond their bound and will be clipped to it."""
    return sum(int((np.abs(values[part.name]) > (part.largest or 0.0)).sum()) for part in layout.values)


def encoded(
    layout: Layout, counts: Mapping[str, Sequence[int]], values: Mapping[str, Numbers], rng: np.random.Generator
) -> Words:
    """Return the words of one client, values beyond their bound clipped to it.

    Args:
        layout: What there is.
        counts: Name -> counts, each at least 0.
        values: Name -> numbers, in any shape.
        rng: Rounds up or down.

    Raises:
        FixedPointError: If a value is not finite, a count is too large for the modulus, or a size is another one.
    """
    parts: list[Words] = []
    for part in layout.counts:
        own = np.asarray(counts[part.name], dtype=np.int64).reshape(-1)
        if len(own) != part.size or (len(own) and (int(own.min()) < 0 or int(own.max()) > layout.most_counted)):
            raise FixedPointError(
                f"{part.name}: {part.size} counts of 0 to {layout.most_counted} have room in a sum of "
                f"{layout.num_clients} clients; got {len(own)}, the largest {max(own.tolist(), default=0)}"
            )
        parts.append(own.astype(np.uint32))
    for part in layout.values:
        assert part.largest is not None
        numbers = np.asarray(values[part.name], dtype=np.float64).reshape(-1)
        if len(numbers) != part.size or not np.isfinite(numbers).all():
            raise FixedPointError(f"{part.name}: {part.size} finite numbers are needed; got {len(numbers)}")
        scaled = np.clip(numbers, -part.largest, part.largest) * (layout.levels / part.largest)
        rounded = np.floor(scaled + rng.random(part.size))
        parts.append(np.clip(rounded, -layout.levels, layout.levels).astype(np.int64).astype(np.uint32))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)


def on_the_way(layout: Layout, words: Words) -> npt.NDArray[np.uint8]:
    """Return words as the bytes that travel: of values only the lowest ``word_bits``, in which all sums are taken."""
    heads, tails = words[: layout.num_counts], words[layout.num_counts :]
    width = layout.word_bits // 8
    in_bytes = tails.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]
    return np.concatenate([heads.astype("<u4").view(np.uint8), in_bytes.reshape(-1)])


def arrived(layout: Layout, data: npt.NDArray[np.uint8]) -> Words:
    """Return the words that ``on_the_way`` made bytes of, their upper bits zero.

    Raises:
        FixedPointError: If there are more or fewer bytes.
    """
    if data.dtype != np.uint8 or data.shape != (layout.num_bytes,):
        raise FixedPointError(f"a vector of this round has {layout.num_bytes} bytes; got {data.size} of {data.dtype}")
    split_at, width = _COUNT_BYTES * layout.num_counts, layout.word_bits // 8
    tails = np.zeros((layout.num_words - layout.num_counts, 4), dtype=np.uint8)
    tails[:, :width] = data[split_at:].reshape(-1, width)
    heads = np.ascontiguousarray(data[:split_at]).view("<u4")
    return np.concatenate([heads, tails.reshape(-1).view("<u4")]).astype(np.uint32)


def decoded(layout: Layout, words: Words) -> tuple[dict[str, list[int]], dict[str, Numbers]]:
    """Return what the words of a sum stand for: counts, and numbers as flat arrays."""
    counts: dict[str, list[int]] = {}
    values: dict[str, Numbers] = {}
    place = 0
    for part in layout.counts:
        counts[part.name] = [int(word) for word in words[place : place + part.size]]
        place += part.size
    half, modulus = 2 ** (layout.word_bits - 1), 2**layout.word_bits
    for part in layout.values:
        assert part.largest is not None
        signed = words[place : place + part.size].astype(np.int64) & (modulus - 1)
        signed = np.where(signed >= half, signed - modulus, signed)
        values[part.name] = signed * (part.largest / layout.levels)
        place += part.size
    return counts, values
