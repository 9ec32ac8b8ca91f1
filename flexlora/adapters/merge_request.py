"""Holds what is asked of a merge and refuses what cannot be met, before any adapter is opened."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from flexlora.adapters.coefficients import COEFFICIENTS, Missing
from flexlora.adapters.merge_numbers import check_device_name, check_directions, check_weights
from flexlora.adapters.peft_format import MergeError
from flexlora.adapters.peft_settings import whole_number
from flexlora.adapters.rank_layout import RankLayout
from flexlora.adapters.write import AdapterDtype
from flexlora.files import file_above
from flexlora.lora.certificate import Accuracy, Certificate
from flexlora.lora.product import Spectrum

FIRST_DIRECTIONS = 64
"""Directions looked for first where a share of the energy decides; then four times as many, as long as need be."""


@dataclass(frozen=True)
class RankRule:
    """How many directions a module keeps: a number, a share of the energy, all, or as many as the largest adapter."""

    rank: int | None
    energy: float | None
    exact: bool

    def __post_init__(self) -> None:
        # One of another type is left as it is, to be refused by its name.
        if (rank := whole_number(self.rank)) is not None:
            object.__setattr__(self, "rank", rank)

    def limit(self, ranks: Sequence[int]) -> int | None:
        """Return how many directions to ask for first; None is all there are."""
        if self.exact or self.energy == 1:
            return None
        if self.energy is not None:
            return FIRST_DIRECTIONS
        return self.rank if self.rank is not None else max(ranks)

    def is_short(self, spectrum: Spectrum, certificate: Certificate, limit: int | None) -> bool:
        """Return whether more directions have to be asked for."""
        if self.energy is None or limit is None or len(spectrum.S) < limit:
            return False
        return certificate.least_energy_kept < self.energy and limit < min(spectrum.shape)

    def chosen(self, spectrum: Spectrum, certificate: Certificate) -> int:
        """Return how many of the directions found to keep."""
        found = len(spectrum.S)
        if self.energy is None or found == 0:
            return max(1, found)
        shares = (spectrum.S / certificate.largest_norm).square().cumsum(0)
        return min(found, 1 + int((shares < self.energy).sum()))


@dataclass(frozen=True)
class MergeRequest:
    """What is asked of a merge; the arguments of ``merge`` say what each means."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    missing: Missing
    rule: RankRule
    accuracy: Accuracy
    device: str
    dtype: AdapterDtype
    allow_different_bases: bool
    layout: RankLayout


def names_of(adapters: Sequence[str | Path]) -> tuple[str, ...]:
    """Return the adapters as text."""
    if isinstance(adapters, str | Path):
        raise MergeError(f"adapters must be a list of folders or hub ids; got only {adapters}, put it in brackets")
    return tuple(str(adapter) for adapter in adapters)


def weights_of(weights: Sequence[float] | None, num_adapters: int) -> tuple[float, ...]:
    """Return the weights as numbers, 1 for every adapter if there are none."""
    if weights is None:
        return (1.0,) * num_adapters
    try:
        if isinstance(weights, str) or any(isinstance(weight, str | bool) for weight in weights):
            raise TypeError
        return tuple(float(weight) for weight in weights)
    except (TypeError, ValueError, OverflowError):
        raise MergeError(f"weights must be numbers, one per adapter, as [3, 1]; got {weights!r:.60}") from None


def check_request(request: MergeRequest) -> None:
    """Raise unless the request makes sense by itself and the device is there."""
    for option, value, allowed in (
        ("method", request.method, tuple(COEFFICIENTS)),
        ("missing", request.missing, get_args(Missing)),
        ("accuracy", request.accuracy, get_args(Accuracy)),
        ("dtype", request.dtype, get_args(AdapterDtype)),
    ):
        if value not in allowed:
            raise MergeError(f"{option} must be one of {', '.join(allowed)}; got {value}")
    if not request.names:
        raise MergeError("merging needs at least one adapter; got none")
    check_weights(request.weights, len(request.names), request.method, request.missing)
    check_directions(request.rule.rank, request.rule.energy, request.rule.exact)
    _check_device(request.device)


def _check_device(device: str) -> None:
    check_device_name(device)
    if torch.device(device).type == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise MergeError(f"device {device} is not there; use cpu")


def existing_parent(folder: Path) -> Path:
    """Return the nearest folder above ``folder`` that exists; ``folder`` itself must not."""
    if os.path.lexists(folder):
        raise MergeError(f"out must not exist yet; {folder} does")
    if file := file_above(folder):
        raise MergeError(f"out: {file} is a file; a folder is needed there; got out={folder}")
    return next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
