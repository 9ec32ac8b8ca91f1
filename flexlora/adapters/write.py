"""Writes adapters as PEFT folders that every tool reads, whole or not at all."""

import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flexlora.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, AdapterError, factor_keys, is_expert
from flexlora.files import appearing_whole
from flexlora.lora.factors import AdapterState, LoraFactors

AdapterDtype = Literal["float32", "bfloat16", "float16"]


Number = TypeVar("Number", int, float)


def write_adapter(
    folder: Path | str, adapter: AdapterState, base_model_name_or_path: str, *, dtype: AdapterDtype = "float32"
) -> None:
    """Write ``adapter`` as a PEFT folder whose every rank and scaling is that of its module.

    Scalings are written as ``lora_alpha = scaling * rank`` per module, so that PEFT's ``lora_alpha / r`` gives them
    back. The folder appears whole or not at all and replaces an adapter. Equal adapters give equal bytes.

    Args:
        folder: Where to write.
        adapter: At least one module.
        base_model_name_or_path: What PEFT loads as the base when asked for the adapter alone; written as it is, so the
            path of a folder ties the adapter to machines that have the base there.
        dtype: Of the factors on disk.

    Raises:
        AdapterError: If there is no module, or ``folder`` holds something else.
    """
    folder = Path(folder)
    if not adapter:
        raise AdapterError("an adapter folder needs at least one module; the adapter has none")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise AdapterError(f"{folder} must be new, empty or an adapter folder; it holds other files")
    tensors: dict[str, Tensor] = {}
    for path, factors in sorted(adapter.items()):
        for key, factor in zip(factor_keys(path), (factors.A, factors.B), strict=True):
            tensors[key] = factor.detach().to("cpu", getattr(torch, dtype)).contiguous()
    ranks = {path: factors.rank for path, factors in adapter.items()}
    alphas = {path: _lora_alpha(factors) for path, factors in adapter.items()}
    with appearing_whole(folder) as partial:
        write_config(partial, peft_config(ranks, alphas, base_model_name_or_path))
        try:
            save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from error


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    """Write the ``adapter_config.json`` of a folder."""
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def peft_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], base_model_name_or_path: str | None
) -> dict[str, object]:
    """Return the configuration of an adapter with exactly these modules, each with its rank and ``lora_alpha``."""
    # No pattern reaches experts that transformers fuses: stock PEFT gives them ``r`` and ``lora_alpha``.
    deciding = [path for path in ranks if is_expert(path)] or list(ranks)
    rank = _most_common([ranks[path] for path in deciding])
    lora_alpha = _most_common([alphas[path] for path in deciding])
    return {
        "alpha_pattern": {_only(path): alpha for path, alpha in alphas.items() if alpha != lora_alpha},
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


def _most_common(values: Sequence[Number]) -> Number:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _only(path: str) -> str:
    """Return the pattern that PEFT matches with this module and no other: it searches for regular expressions."""
    return f"^{re.escape(path)}"


def _lora_alpha(factors: LoraFactors) -> int | float:
    """Return the alpha that divided by the rank is the scaling, whole where that is exact."""
    alpha = factors.scaling * factors.rank
    return round(alpha) if round(alpha) / factors.rank == factors.scaling else alpha
