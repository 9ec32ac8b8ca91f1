"""Turns PEFT state dicts, as they travel in Flower's ArrayRecords, into factors and back."""

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.state_dict import adapter_of, state_dict_of
from flexlora.errors import FlexLoraError
from flexlora.lora.factors import AdapterState, Scaling


class PeftRecordError(FlexLoraError, ValueError):
    """An ArrayRecord that is no state dict of a LoRA adapter."""


def to_record(adapter: AdapterState) -> ArrayRecord:
    """Return an adapter as the state dict that ``peft.get_peft_model_state_dict`` gives, in float32."""
    return ArrayRecord({key: Array(factor.numpy()) for key, factor in state_dict_of(adapter).items()})


def from_record(record: ArrayRecord, scaling: Scaling) -> AdapterState:
    """Return the adapter in a state dict.

    Args:
        record: Arrays as ``ArrayRecord(state_dict)`` makes them.
        scaling: The rule of ``lora_alpha``, which a state dict does not hold.

    Raises:
        PeftRecordError: If a key is none of LoRA's, half of a module is missing, or an array cannot be read.
    """
    try:
        return adapter_of({key: _tensor(key, array) for key, array in record.items()}, scaling)
    except AdapterError as error:
        raise PeftRecordError(str(error)) from None


def _tensor(key: str, array: Array) -> torch.Tensor:
    try:
        values = array.numpy()
    except Exception as error:  # Whatever bytes of somebody else make numpy raise.
        raise PeftRecordError(f"{key}: the array cannot be read ({type(error).__name__}: {error})") from error
    if values.dtype.kind != "f":
        raise PeftRecordError(f"{key}: an array must be a matrix of floats; got {values.dtype} {values.shape}")
    return torch.from_numpy(np.array(values, dtype=np.float32))
