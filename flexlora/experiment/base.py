"""Loads the base model that a configuration names."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.adapters.base_names import portable_name
from flexlora.data.chat_template import special_tokens
from flexlora.data.examples import Example
from flexlora.data.pretraining import EMBEDDED_BASE, is_embedded_base
from flexlora.data.prompt_templates import Template
from flexlora.data.prompts import encode, padding_token
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
        quantization=settings.quantization,
    )


def num_processes(config: Config) -> int | None:
    """Return the processes that may train clients, None for as many as suit: quantised weights are in one."""
    return 1 if config.model.quantization is not None else config.model.num_processes


def load_empty(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the base model without weights and its tokenizer."""
    settings = config.model
    return load_empty_model(
        settings.name_or_path,
        dtype=settings.dtype,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


class BaseModelError(FlexLoraError, ValueError):
    """A device or rank plan that the base model cannot serve."""


def resolve_device(name: str) -> str:
    """Return the device that ``auto`` stands for, or the one named.

    Raises:
        BaseModelError: If a CUDA device is asked for that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BaseModelError(f"model.device={name} needs a CUDA device and there is none; use model.device=cpu or auto")
    number = int(name.partition(":")[2] or 0) if name.startswith("cuda") else 0
    if name.startswith("cuda") and number >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise BaseModelError(f"model.device={name} is not there; the CUDA devices here are cuda:0 to cuda:{last}")
    return name


def check_length(config: Any, max_length: int) -> None:
    """Raise if sequences can be longer than the base model's context.

    Raises:
        BaseModelError: Naming both lengths.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    # XLNet, for one, says -1 for a context without an end.
    if context is not None and 0 < context < max_length:
        raise BaseModelError(
            f"data.max_length must be at most {context}, the context of the base model; got {max_length}"
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Raise unless the tokenizer can write prompts and the base model has a row for every token it may give.

    Tokens that are special and neither the start, the end nor the padding stay unused: no text becomes one, unless the
    chat template writes it.

    Raises:
        BaseModelError: Naming the tokens without a row.
        PromptError: The template cannot be written or nothing ends an answer.
    """
    written = encode(Example("question", "", ("answer",)), tokenizer, template, max_length=10_000).input_ids
    embeddings: Any = model.get_input_embeddings()
    num_rows = int(embeddings.weight.shape[0])
    special = special_tokens(tokenizer)
    ends: list[Any] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    named = {*ends, padding_token(tokenizer), *written}
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= num_rows}
    used = {
        number: token
        for number, token in sorted(beyond.items())
        if number not in special or number in named or (template == "chat" and token in str(tokenizer.chat_template))
    }
    if used:
        shown = ", ".join(f"{token!r} ({number})" for number, token in list(used.items())[:3])
        raise BaseModelError(
            f"the base model must have an embedding for every token of its tokenizer; it has {num_rows} rows and the "
            f"tokenizer has {len(tokenizer)} tokens, of which {len(used)} are beyond, such as {shown}: use the "
            "tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and save both"
        )
