"""Turns PEFT state dicts of plain LoRA adapters into factors and back."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from flexlora.adapters.peft_format import AdapterError, factor_keys
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

# PEFT leaves the adapter's name out of a state dict that it returns, and not out of the model's own.
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")


def state_dict_of(adapter: AdapterState) -> dict[str, Tensor]:
    """Return an adapter as the state dict that ``peft.get_peft_model_state_dict`` gives: float32, on the CPU."""
    found: dict[str, Tensor] = {}
    for module, own in sorted(adapter.items()):
        for key, factor in zip(factor_keys(module), (own.A, own.B), strict=True):
            found[key] = factor.detach().to(device="cpu", dtype=torch.float32).contiguous()
    return found


def adapter_of(state_dict: Mapping[str, Tensor], scaling: Scaling) -> AdapterState:
    """Return the adapter in a state dict.

    Args:
        state_dict: As ``peft.get_peft_model_state_dict`` gives it.
        scaling: The rule of ``lora_alpha``, which a state dict does not hold.

    Raises:
        AdapterError: If a key is none of LoRA's on linear modules, half of a module is missing, or the two do not fit.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, factor in state_dict.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise AdapterError(
                f"a state dict may hold lora_A.weight and lora_B.weight of linear modules and nothing else; got {key!r}"
            )
        parts = found.setdefault(match["module"], {})
        if match["factor"] in parts:
            raise AdapterError(f"a state dict may hold each factor once; {key!r} is there under another name too")
        if factor.ndim != 2 or not factor.is_floating_point():
            raise AdapterError(f"{key}: must be a matrix of floats; got {factor.dtype} {tuple(factor.shape)}")
        parts[match["factor"]] = factor
    if not found:
        raise AdapterError("a state dict must hold at least one module; got an empty one")
    return {module: _factors(module, parts, scaling) for module, parts in sorted(found.items())}


def _factors(module: str, parts: Mapping[str, Tensor], scaling: Scaling) -> LoraFactors:
    if parts.keys() != {"A", "B"} or parts["A"].shape[0] != parts["B"].shape[1] or not parts["A"].shape[0]:
        shapes = {name: tuple(part.shape) for name, part in parts.items()}
        raise AdapterError(f"{module}: needs A [rank, in_features] and B [out_features, rank]; got {shapes}")
    return LoraFactors(parts["A"], parts["B"], scaling(parts["A"].shape[0]))
