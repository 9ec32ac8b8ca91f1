"""Writes adapters as PEFT folders that every tool reads, whole or not at all."""

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flexlora.adapters.card import Card, plain_card
from flexlora.adapters.laid_out import common_alpha, laid_out
from flexlora.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, AdapterError, factor_keys
from flexlora.adapters.peft_settings import is_number
from flexlora.adapters.rank_layout import RankLayout, Ranks, common_rank
from flexlora.files import appearing_whole
from flexlora.lora.factors import AdapterState

AdapterDtype = Literal["float32", "bfloat16", "float16"]


def write_adapter(
    folder: Path | str,
    adapter: AdapterState,
    base_model_name_or_path: str,
    *,
    dtype: AdapterDtype = "float32",
    ranks: Ranks = "uniform",
    pad_to: int | None = None,
    revision: str | None = None,
    card: Card | None = None,
) -> None:
    """Write ``adapter`` as a PEFT folder that readers without patterns understand too.

    All modules share one whole ``lora_alpha``: their own where they have one, or else the rank; what is left of a
    scaling goes into both factors. The folder appears whole or not at all and replaces an adapter. Equal adapters give
    equal bytes.

    Args:
        folder: Where to write.
        adapter: At least one module.
        base_model_name_or_path: What PEFT loads as the base when asked for the adapter alone; written as it is, so the
            path of a folder ties the adapter to machines that have the base there.
        dtype: Of the factors on disk.
        ranks: ``uniform`` pads smaller ranks to the largest with directions that change nothing and can be trained;
            ``exact`` keeps every module's own in ``rank_pattern``.
        pad_to: The one rank to pad to, of those that vLLM makes room for: 1, 8, 16, 32, 64, 128, 256, 320 or 512.
        revision: Branch, tag or commit of the base model on the hub; None is its main one.
        card: What ``README.md`` says; None says what is written and how to load it.

    Raises:
        AdapterError: If there is no module, ``folder`` holds something else, a scaling is no finite number, ``dtype``
            cannot hold a factor, or ``dtype``, ``ranks`` and ``pad_to`` are not allowed or do not fit.
    """
    folder, layout = Path(folder), RankLayout(ranks, pad_to)
    if not adapter:
        raise AdapterError("an adapter folder needs at least one module; the adapter has none")
    if dtype not in get_args(AdapterDtype):
        raise AdapterError(f"dtype must be one of {', '.join(get_args(AdapterDtype))}; got {dtype}")
    for path, factors in adapter.items():
        if not is_number(factors.scaling):
            raise AdapterError(f"the scaling of {path} must be a finite number; got {factors.scaling!r}")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} must be new, empty or an adapter folder; it holds other files")
    stored = layout.stored({path: factors.rank for path, factors in adapter.items()})
    lora_alpha = common_alpha(adapter, stored)
    tensors: dict[str, Tensor] = {}
    for path, factors in sorted(adapter.items()):
        written = laid_out(path, factors, stored[path], lora_alpha)
        for key, factor in zip(factor_keys(path), (written.A, written.B), strict=True):
            tensors[key] = _cast(key, factor, dtype)
    config = peft_config(stored, lora_alpha, base_model_name_or_path) | {"revision": revision}
    card = card or plain_card(base_model_name_or_path, common_rank(stored), len(stored))
    with appearing_whole(folder) as partial:
        write_config(partial, config)
        card.write(partial)
        try:
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from error


def _cast(key: str, factor: Tensor, dtype: AdapterDtype) -> Tensor:
    """Return a factor as it is stored."""
    cast = factor.detach().to("cpu", getattr(torch, dtype)).contiguous()
    if not cast.isfinite().all() and factor.isfinite().all():
        limit = torch.finfo(cast.dtype).max
        raise AdapterError(f"{key} must be within {limit:.1g} for {dtype}; use a type that holds more, as bfloat16")
    return cast


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write the ``adapter_config.json`` of a folder."""
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def peft_config(ranks: Mapping[str, int], lora_alpha: int, base_model_name_or_path: str | None) -> dict[str, object]:
    """Return the configuration of an adapter with exactly these modules, each with its rank."""
    rank = common_rank(ranks)
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": importlib.metadata.version("peft"),
        "r": rank,
        "rank_pattern": {_only(path): own for path, own in ranks.items() if own != rank},
        "target_modules": sorted(ranks),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _only(path: str) -> str:
    """Return the pattern that PEFT matches with this module and no other: it searches for regular expressions."""
    return f"^{re.escape(path)}"
