"""Finds what adapters agree on among the whole weights that PEFT saves beside factors, and where to write it."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from flexlora.adapters.folder import AdapterFolder
from flexlora.adapters.peft_format import MergeError
from flexlora.adapters.stored_modules import check_rows

_NARROW = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK_ROWS = 4096


def check_copies(opened: Sequence[AdapterFolder]) -> None:
    """Raise unless the whole weights of every adapter fit the factors of the others.

    Raises:
        MergeError: Naming the module and both adapters.
    """
    for path in copied_paths(opened):
        having = [adapter for adapter in opened if path in adapter.copies]
        adapted = next((adapter for adapter in opened if path in adapter.modules), None)
        for adapter in having:
            if adapter.copies[path].shape != having[0].copies[path].shape:
                raise _different(path, having[0], adapter)
            if adapted is not None:
                check_rows(path, adapter.copies[path], adapted.modules[path], adapter.name, adapted.name)


def copied_paths(opened: Sequence[AdapterFolder]) -> list[str]:
    """Return the modules of which an adapter holds the whole weight, sorted."""
    return sorted({path for adapter in opened for path in adapter.copies})


def copy_key(path: str, adapted: Collection[str]) -> str:
    """Return the key that PEFT loads a whole weight from: under the factors if the module is among ``adapted``."""
    return f"base_model.model.{path}.base_layer.weight" if path in adapted else f"base_model.model.{path}.weight"


def common_copy(opened: Sequence[AdapterFolder], path: str) -> Tensor:
    """Return the whole weight of a module that all adapters which have it agree on, at the highest precision of it.

    Raises:
        MergeError: If two differ by more than the rounding of their types.
    """
    chosen: tuple[Tensor, AdapterFolder] | None = None
    for adapter in opened:
        if path not in adapter.copies:
            continue
        for weight in adapter.whole_weights(path):
            if chosen is None:
                chosen = weight, adapter
                continue
            if not is_same_weight(chosen[0], weight):
                raise _different(path, chosen[1], adapter)
            if not _is_close(chosen[0], weight, 0.0, 0.0) and _eps(weight) < _eps(chosen[0]):
                chosen = weight, adapter
    assert chosen is not None
    return chosen[0]


def is_same_weight(one: Tensor, other: Tensor) -> bool:
    """Return whether two matrices are equal but for the precision they were stored with at some time.

    Numbers of one precision must be equal to the bit. A type that is wider than the numbers in it need does not count:
    weights that were rounded to bfloat16 stay rounded in float32.
    """
    if one.shape != other.shape:
        return False
    if _is_close(one, other, 0.0, 0.0):
        return True
    types = _needed(one), _needed(other)
    if types[0] == types[1]:
        return False
    # Both may have been rounded from the weight itself, each by half the distance of two numbers of its type.
    relative = sum(torch.finfo(dtype).eps for dtype in types) / 2
    # Below the normal numbers of a type, which few digits hold, the distance stays the same.
    stored = {*types, one.dtype, other.dtype}
    absolute = sum(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in stored) / 2
    return _is_close(one, other, relative * (1 + relative), absolute)


def _is_close(one: Tensor, other: Tensor, relative: float, absolute: float) -> bool:
    """Return whether no number differs by more than ``relative`` of the larger one and ``absolute``."""
    for pair in zip(one.split(_BLOCK_ROWS), other.split(_BLOCK_ROWS), strict=True):
        a, b = (block.to(torch.float64) for block in pair)
        if bool(((a - b).abs() > relative * torch.maximum(a.abs(), b.abs()) + absolute).any()):
            return False
    return True


def _needed(weight: Tensor) -> torch.dtype:
    """Return the narrowest type that holds every number of a matrix exactly."""
    for dtype in _NARROW:
        if weight.dtype == dtype or all(
            torch.equal(block.to(dtype).to(block.dtype), block) for block in weight.split(_BLOCK_ROWS)
        ):
            return dtype
    return weight.dtype


def _eps(weight: Tensor) -> float:
    """Return the relative distance of two numbers in a matrix, smaller is more precise."""
    return torch.finfo(_needed(weight)).eps


def _different(path: str, one: AdapterFolder, other: AdapterFolder) -> MergeError:
    return MergeError(
        f"{path} is saved whole beside the factors, and {one.name} and {other.name} hold different weights: save the "
        "adapters with save_embedding_layers=False if it was not trained, or merge each into its base if it was"
    )
