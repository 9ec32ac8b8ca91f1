"""Turns the parameters of NVFlare's models, arrays by PEFT's names, into factors and back."""

from collections.abc import Mapping
from math import isclose
from typing import Any

import numpy as np
import torch

from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.state_dict import adapter_of, state_dict_of
from flexlora.errors import FlexLoraError
from flexlora.lora.factors import AdapterState, Scaling

SCALINGS_KEY = "lora_scaling"
"""Key in the ``meta`` of a model: module path -> what ``B @ A`` is multiplied by there."""


class NvflareError(FlexLoraError, ValueError):
    """A model, a reply or a setting that rounds over NVFlare cannot use."""


def params_of(adapter: AdapterState) -> dict[str, np.ndarray]:
    """Return copies of the factors as arrays by the names of ``peft.get_peft_model_state_dict``, in float32."""
    return {key: factor.numpy().copy() for key, factor in state_dict_of(adapter).items()}


def scalings_of(adapter: AdapterState) -> dict[str, float]:
    """Return what belongs into the ``meta`` of a model under ``SCALINGS_KEY``."""
    return {module: float(own.scaling) for module, own in sorted(adapter.items())}


def adapter_in(params: object, scaling: Scaling) -> AdapterState:
    """Return the adapter in the parameters of a model, in float32.

    Args:
        params: Arrays by PEFT's names.
        scaling: The rule that gives the scaling of a rank.

    Raises:
        NvflareError: If they are anything but whole LoRA factors of linear modules.
    """
    if not isinstance(params, Mapping):
        raise NvflareError(f"a model must be a mapping of names to arrays; got {type(params).__name__}")
    try:
        return adapter_of({key: _tensor(key, value) for key, value in params.items()}, scaling)
    except AdapterError as error:
        raise NvflareError(str(error)) from None


def check_scalings(adapter: AdapterState, told: object) -> None:
    """Raise unless a sender multiplies its factors by what the rule of the job gives their ranks.

    Args:
        adapter: The sender's, with the scalings of the rule.
        told: What the sender says of itself under ``SCALINGS_KEY``.

    Raises:
        NvflareError: Naming the module and both scalings.
    """
    if not isinstance(told, Mapping):
        raise NvflareError(
            f"meta must hold {SCALINGS_KEY!r}, a mapping of module paths to scalings; got {type(told).__name__}"
        )
    for module, own in adapter.items():
        found = told.get(module)
        if not isinstance(found, int | float) or not isclose(found, own.scaling, rel_tol=1e-6):
            raise NvflareError(
                f"{module}: scaling must be {own.scaling:.9g} at rank {own.rank}, as lora_alpha and scaling of the "
                f"aggregator have it; got {found!r:.60}. Set lora_alpha and use_rslora of the LoraConfig to the same"
            )


def _tensor(key: object, value: Any) -> torch.Tensor:
    """Return a copy of an array, floats as float32."""
    try:
        tensor = torch.from_numpy(np.array(value))
    except Exception as error:  # Whatever values of somebody else make numpy raise.
        raise NvflareError(f"{key!r:.200}: cannot be read as an array ({type(error).__name__}: {error})") from error
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
