"""Loads the base model that a configuration names."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.adapters.base_names import portable_name
from flexlora.data.pretraining import EMBEDDED_BASE, is_embedded_base
from flexlora.errors import FlexLoraError
from flexlora.experiment.config import Config
from flexlora.training.base_model import load_base_model, load_empty_model


def base_name(config: Config) -> str:
    """Return what adapters call the base model: one name on every machine, never a path of this one."""
    name = config.model.name_or_path
    return EMBEDDED_BASE if is_embedded_base(name) else portable_name(name)


def load_base(config: Config, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model on ``device``, frozen, and its tokenizer."""
    settings = config.model
    return load_base_model(
        settings.name_or_path,
        dtype=settings.dtype,
        device=device,
        attn_implementation=settings.attn_implementation,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def load_empty(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model without weights and its tokenizer."""
    settings = config.model
    return load_empty_model(
        settings.name_or_path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )


class BaseModelError(FlexLoraError, ValueError):
    """A device or rank plan that the base model cannot serve."""


def resolve_device(name: str) -> str:
    """Return the device that ``auto`` stands for, or the one named.

    Raises:
        BaseModelError: If CUDA is asked for where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BaseModelError(f"model.device={name} needs a CUDA device and there is none; use model.device=cpu or auto")
    return name


def check_length(config: Any, max_length: int) -> None:
    """Raise if sequences can be longer than the base model's context.

    Raises:
        BaseModelError: Naming both lengths.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise BaseModelError(
            f"data.max_length must be at most {context}, the context of the base model; got {max_length}"
        )
