"""Turns PEFT state dicts, as they travel in Flower's ArrayRecords, into factors and back."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from flexlora.adapters.peft_format import factor_keys
from flexlora.errors import FlexLoraError
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

# PEFT leaves the adapter's name out of a state dict that it returns, and not out of the model's own.
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


class PeftRecordError(FlexLoraError, ValueError):
    """An ArrayRecord that is no state dict of a LoRA adapter."""


def to_record(adapter: AdapterState) -> ArrayRecord:
    """Return an adapter as the state dict that ``peft.get_peft_model_state_dict`` gives, in float32."""
    arrays: dict[str, Array] = {}
    for module, own in sorted(adapter.items()):
        for key, factor in zip(factor_keys(module), (own.A, own.B), strict=True):
            arrays[key] = Array(np.ascontiguousarray(factor.detach().to(device="cpu", dtype=torch.float32).numpy()))
    return ArrayRecord(arrays)


def from_record(record: ArrayRecord, scaling: Scaling) -> AdapterState:
    """Return the adapter in a state dict.

    Args:
        record: Arrays as ``ArrayRecord(state_dict)`` makes them.
        scaling: The rule of ``lora_alpha``, which a state dict does not hold.

    Raises:
        PeftRecordError: If a key is none of LoRA's, half of a module is missing, or an array cannot be read.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, array in record.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise PeftRecordError(
                f"a state dict may hold lora_A.weight and lora_B.weight of linear modules and nothing else; got {key!r}"
            )
        found.setdefault(match["module"], {})[match["factor"]] = _tensor(key, array)
    if not found:
        raise PeftRecordError("a state dict must hold at least one module; got an empty one")
    return {module: _factors(module, parts, scaling) for module, parts in sorted(found.items())}


def _tensor(key: str, array: Array) -> torch.Tensor:
    try:
        values = array.numpy()
    except Exception as error:  # Whatever bytes of somebody else make numpy raise.
        raise PeftRecordError(f"{key}: the array cannot be read ({type(error).__name__}: {error})") from error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise PeftRecordError(f"{key}: an array must be a matrix of floats; got {values.dtype} {values.shape}")
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _factors(module: str, parts: Mapping[str, torch.Tensor], scaling: Scaling) -> LoraFactors:
    if parts.keys() != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1] or not parts["A"].shape[0]:
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        raise PeftRecordError(f"{module}: needs A [rank, in_features] and B [out_features, rank]; got {shapes}")
    return LoraFactors(parts["A"], parts["B"], scaling(parts["A"].shape[0]))
