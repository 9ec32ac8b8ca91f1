"""Defines what a linear module of a base model is, and the error of a base model that cannot be used."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from flexlora.errors import FlexLoraError


class ModelError(FlexLoraError, ValueError):
    """A base model that cannot be loaded or adapted as asked."""


def features(module: nn.Module) -> tuple[int, int]:
    """Return ``(out_features, in_features)`` of a linear module."""
    if isinstance(module, Conv1D):
        # GPT-2 stores the transpose of what nn.Linear stores.
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear)
    return module.out_features, module.in_features
