"""Chooses the range and the marks of an axis, and turns values into places on it."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexlora.text import number_text

NumberText = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to drawing units."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value; values outside land on the edge."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        if self.is_log:
            value = math.log10(max(value, self.low))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


def ticks(low: float, high: float, count: int = 5, integers: bool = False) -> list[float]:
    """Return about ``count`` round numbers within ``low`` and ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if integers:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within ``low`` and ``high``, at most seven."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / 7))
    return [10.0**power for power in range(first, last + 1, stride)]


def index_ticks(num_values: int) -> list[float]:
    """Return 1 and round whole numbers up to ``num_values``."""
    return [1.0, *(mark for mark in ticks(0, max(num_values, 2), 6, True) if mark > 1)]


def axis_range(low: float, high: float, from_zero: bool) -> tuple[float, float]:
    """Return the ends of an axis that holds ``low`` and ``high``, at round numbers."""
    if from_zero:
        low = min(low, 0.0)
    if not high > low:
        low, high = (low, low + 1.0) if from_zero else (low - 0.5, high + 0.5)
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def mark_writer(marks: Sequence[float]) -> NumberText:
    """Return a function that writes a mark with as many decimals as tell all of them apart."""
    steps = [abs(after - before) for before, after in itertools.pairwise(marks)]
    decimals = max(0, -math.floor(math.log10(min(steps)) + 1e-9)) if steps else 1
    if steps and round(min(steps) * 10**decimals, 6) % 1:
        decimals += 1
    return lambda value: number_text(value, decimals)


def power_of_ten_text(value: float) -> str:
    """Return a power of ten as a plain number while it is short, else as 10 with a raised exponent."""
    power = round(math.log10(value))
    if -3 <= power <= 4:
        return f"{value:g}"
    return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
