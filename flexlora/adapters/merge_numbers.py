"""Refuses numbers and names that no merge can use, before anything heavy is loaded."""

import re
from collections.abc import Sequence
from math import isfinite

from flexlora.adapters.peft_format import MergeError
from flexlora.adapters.peft_settings import is_number, whole_number


def check_weights(weights: Sequence[float], num_adapters: int, method: str, missing: str) -> None:
    """Raise unless there is a weight for every adapter that the method can use.

    Raises:
        MergeError: Naming the weights.
    """
    if missing == "renormalise" and method == "sum":
        raise MergeError("missing=renormalise divides by the weights of those that have a module; use method=mean")
    if len(weights) != num_adapters:
        raise MergeError(f"weights must be one per adapter, {num_adapters} here; got {len(weights)}")
    if not all(isfinite(weight) and (weight > 0 if method == "mean" else weight != 0) for weight in weights):
        wanted = "positive for method=mean (use sum for signed ones)" if method == "mean" else "other than 0"
        raise MergeError(f"weights must be finite and {wanted}; got {', '.join(f'{w:g}' for w in weights)}")


def check_directions(rank: int | None, energy: float | None, exact: bool) -> None:
    """Raise unless at most one of a rank, a share of the energy and ``exact`` is asked for, in its range.

    Raises:
        MergeError: Naming it.
    """
    if (rank is not None) + (energy is not None) + exact > 1:
        raise MergeError("only one of rank, energy and exact can decide how many directions to keep; got several")
    whole = whole_number(rank)
    if rank is not None and (whole is None or whole < 1):
        raise MergeError(f"rank must be a whole number of at least 1; got {rank!r}")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise MergeError(f"energy must be a share above 0 and up to 1; got {energy!r}")


def check_device_name(device: str) -> None:
    """Raise unless a device is called as torch calls it; whether it is there is looked at later.

    Raises:
        MergeError: Naming the devices.
    """
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise MergeError(f"device must be cpu, cuda or cuda:N; got {device}")
