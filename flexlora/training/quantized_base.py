"""Describes how a base model's weights are quantised while it is loaded, which is left to bitsandbytes.

LoRA factors stay float32 and are trained as on any other base; products with quantised weights are computed in the type
of the base. Quantised weights cannot be merged with a change: rounding them anew would undo a part of it.
"""

import importlib.util
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from flexlora.training.linear_modules import ModelError

Quantization = Literal["8bit", "4bit"]

STORED_BYTES: dict[Quantization, float] = {"8bit": 1.0, "4bit": 0.56}
"""Bytes of a weight, its share of the scales included; embeddings and the output layer stay whole."""


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers needs to quantise a model while it loads it.

    Args:
        quantization: ``8bit`` is LLM.int8() (arXiv:2208.07339), ``4bit`` is NF4 with quantised scales, as in QLoRA
            (arXiv:2305.14314).
        dtype: In which products are computed.

    Raises:
        ModelError: If bitsandbytes is missing.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model.quantization={quantization} needs {' and '.join(missing)}; pip install 'flexlora[bitsandbytes]', "
            "or set model.quantization=null"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_trainable(network: nn.Module) -> None:
    """Keep the layout of quantised weights through which gradients pass.

    On processors with AVX512-BF16, the first forward pass of a 4-bit layer in evaluation mode would lay its weights out
    anew for inference, in bfloat16 and without a backward pass (bitsandbytes 0.50).
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def num_weights(parameter: nn.Parameter) -> int:
    """Return how many weights a parameter holds, of which 4 bits store two in one byte."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def is_quantized(network: nn.Module) -> bool:
    """Return whether a network's weights are quantised."""
    return getattr(network, "hf_quantizer", None) is not None
