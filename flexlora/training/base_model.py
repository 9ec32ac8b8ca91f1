"""Loads a base model, with or without its weights, and finds the modules to adapt."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flexlora.adapters.base_names import is_gguf
from flexlora.data.pretraining import resolve_base_model
from flexlora.hub_reach import hub_is_reached
from flexlora.training.gguf_base import unpacked
from flexlora.training.linear_modules import ModelError
from flexlora.training.model_folder import check_sizes, check_tokenizer, check_weights, loading
from flexlora.training.probes import is_causal
from flexlora.training.quantized_base import Quantization, keep_trainable, quantization_config
from flexlora.training.targets import Selection, find_targets

ModelDtype = Literal["float32", "bfloat16"]


def load_base_model(
    name_or_path: str,
    *,
    dtype: ModelDtype,
    device: str,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a causal language model, frozen and in evaluation mode, and its tokenizer.

    Args:
        name_or_path: A local folder, a hub id, a GGUF file (see ``unpacked``), or a name of the base in the package
            (``resolve_base_model``).
        dtype: Of the base weights; LoRA factors stay float32.
        device: Where the weights go, for example ``cpu`` or ``cuda:0``.
        attn_implementation: As transformers names it: ``sdpa``, ``eager`` or ``flash_attention_2``; None is what
            transformers itself takes for this architecture.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let a hub repository run its own model code.
        quantization: Quantise the weights of linear modules while loading (see ``quantization_config``).

    Raises:
        ModelError: If there is no such model, the machine is offline and has no copy of it, its files are damaged, or
            bitsandbytes is needed and missing.
    """
    name_or_path = resolve_base_model(name_or_path)
    is_reached = Path(name_or_path).expanduser().exists() or hub_is_reached()
    with loading(name_or_path, is_reached):
        name_or_path, revision = _folder_of(name_or_path, dtype, revision, is_reached)
        source: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        source |= {} if is_reached else {"local_files_only": True}
        quantized: dict[str, Any] = {}
        if quantization is not None:
            quantized["quantization_config"] = quantization_config(quantization, getattr(torch, dtype))
            quantized["device_map"] = {"": device}
        check_sizes(AutoConfig.from_pretrained(name_or_path, **source).to_dict(), name_or_path)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
            **source,
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **source)
        check_weights(model, info, name_or_path)
        check_tokenizer(tokenizer, name_or_path)
        network = frozen(model)
        keep_trainable(network)
        if quantization is None:  # Others are where they were quantised.
            network = network.to(device)  # pyright: ignore[reportArgumentType]
        if not is_causal(network):
            raise ModelError(
                f"{name_or_path} must be a causal language model, in which no token sees what follows it; "
                f"{type(network).__name__} lets tokens see all others: name another base model"
                f"{', or set is_decoder to true in its config.json' if hasattr(network.config, 'is_decoder') else ''}"
            )
    return network, tokenizer


def load_empty_model(
    name_or_path: str,
    *,
    dtype: ModelDtype = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model without weights (on the meta device) and its tokenizer, for shapes and estimates.

    Args:
        name_or_path: As for ``load_base_model``, and so are the others.
        dtype: In which a GGUF file is unpacked, if it has not been.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Let a hub repository run its own model code.

    Raises:
        ModelError: If there is no such model, the machine is offline and has no copy of it, or its files are damaged.
    """
    name_or_path = resolve_base_model(name_or_path)
    is_reached = Path(name_or_path).expanduser().exists() or hub_is_reached()
    with loading(name_or_path, is_reached):
        name_or_path, revision = _folder_of(name_or_path, dtype, revision, is_reached)
        source: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        source |= {} if is_reached else {"local_files_only": True}
        config = AutoConfig.from_pretrained(name_or_path, **source)
        check_sizes(config.to_dict(), name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **source)
        check_tokenizer(tokenizer, name_or_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model, tokenizer


def _folder_of(name_or_path: str, dtype: ModelDtype, revision: str | None, is_reached: bool) -> tuple[str, str | None]:
    """Return what transformers loads, and its revision: for a GGUF file the folder it is unpacked in."""
    if not is_gguf(name_or_path):
        return name_or_path, revision
    return str(unpacked(name_or_path, dtype, revision, is_reached)), None


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without gradients and in evaluation mode."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def target_modules(model: PreTrainedModel, selection: Selection) -> dict[str, tuple[int, int]]:
    """Return module path -> ``(out_features, in_features)`` of the modules to adapt; see ``find_targets``."""
    return dict(find_targets(model, selection).shapes)
