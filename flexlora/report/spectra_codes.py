"""Packs the numbers behind the spectra of a page, two characters each; the script of the page unpacks them."""

import math
from collections.abc import Sequence

from flexlora.rounds.records import SpectrumRecord

NOT_THERE = "//"
"""Stands for a missing value in `encode`."""

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

_MAX_CODE = 4094


def pack_spectra(spectra: Sequence[Sequence[SpectrumRecord | None]], low: float, high: float) -> dict[str, object]:
    """Return ``indices`` (lists of 1-based places) and ``values`` (per module and round, ``list:codes``)."""
    lengths: list[int] = []
    values = []
    for line in spectra:
        cells = []
        for spectrum in line:
            numbers = spectrum.singular_values if spectrum else []
            if len(numbers) not in lengths:
                lengths.append(len(numbers))
            logs = [
                math.log10(max(numbers[k - 1], low)) if math.isfinite(numbers[k - 1]) else None
                for k in sampled_indices(len(numbers))
            ]
            codes = encode(logs, math.log10(low), math.log10(high))
            cells.append(f"{lengths.index(len(numbers))}:{codes}")
        values.append(cells)
    return {"indices": [sampled_indices(length) for length in lengths], "values": values}


def encode(values: Sequence[float | None], low: float, high: float) -> str:
    """Return values as two characters each, on a scale of 4,095 steps from ``low`` to ``high``."""
    return "".join(_encode_one(value, low, high) for value in values)


def sampled_indices(length: int, most: int = 48) -> list[int]:
    """Return at most about ``most`` 1-based indices up to ``length``: the first ones all, later ones ever sparser."""
    if length <= most:
        return list(range(1, length + 1))
    head = most // 3
    ratio = (length / head) ** (1 / (most - head))
    later = {min(length, round(head * ratio**step)) for step in range(1, most - head + 1)}
    return sorted({*range(1, head + 1), *later, length})


def _encode_one(value: float | None, low: float, high: float) -> str:
    if value is None or not math.isfinite(value):
        return NOT_THERE
    share = (value - low) / (high - low) if high > low else 0.0
    code = round(min(max(share, 0.0), 1.0) * _MAX_CODE)
    return _DIGITS[code // 64] + _DIGITS[code % 64]
