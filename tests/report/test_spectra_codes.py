"""Packed numbers, unpacked as the page does it."""

import math

import pytest

from flexlora.report.spectra_codes import encode, sampled_indices


def decode(code: str, low: float, high: float) -> float | None:
    """What the page's script does, written again from its description."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 64 * digits.index(code[0]) + digits.index(code[1])
    return None if number == 4095 else low + (high - low) * number / 4094


@pytest.mark.parametrize("value", [-8.0, -3.2, 0.0, 1.9999, 2.0])
def test_encoded_values_come_back_within_half_a_step(value: float) -> None:
    back = decode(encode([value], -8.0, 2.0), -8.0, 2.0)
    assert back == pytest.approx(value, abs=10 / 4094 / 2 + 1e-12)


def test_values_that_are_missing_or_broken_are_encoded_as_missing() -> None:
    codes = encode([None, math.nan, 5.0], 0.0, 1.0)
    assert [decode(codes[place : place + 2], 0.0, 1.0) for place in (0, 2, 4)] == [None, None, 1.0]


@pytest.mark.parametrize("length", [0, 1, 48, 49, 200, 4096])
def test_sampled_indices_keep_the_first_the_last_and_the_order(length: int) -> None:
    indices = sampled_indices(length)
    assert indices == sorted(set(indices))
    assert len(indices) <= 49
    assert indices[:16] == list(range(1, min(length, 16) + 1))
    assert indices[-1:] == ([length] if length else [])
