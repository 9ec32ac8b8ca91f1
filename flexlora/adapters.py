"""LoRA adapters on disk: the PEFT folder that every tool reads, and whole models with the adapter merged in."""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from flexlora import FlexLoraError
from flexlora.lora.factors import AdapterState, LoraFactors

AdapterDtype = Literal["float32", "bfloat16", "float16"]

Number = TypeVar("Number", int, float)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<name>[AB])\.weight")


class AdapterError(FlexLoraError, ValueError):
    """An adapter that cannot be written, read or merged."""


def write_adapter(
    folder: Path | str, adapter: AdapterState, base_model_name_or_path: str, *, dtype: AdapterDtype = "float32"
) -> None:
    """Write ``adapter`` as a PEFT folder whose every rank and scaling is that of its module.

    Scalings are written as ``lora_alpha = scaling * rank`` per module, so that PEFT's ``lora_alpha / r`` gives them
    back. The folder appears whole or not at all and replaces an adapter. Equal adapters give equal bytes.

    Args:
        folder: Where to write.
        adapter: At least one module.
        base_model_name_or_path: What PEFT loads as the base when asked for the adapter alone.
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
        for name, factor in (("A", factors.A), ("B", factors.B)):
            tensors[f"base_model.model.{path}.lora_{name}.weight"] = (
                factor.detach().to("cpu", getattr(torch, dtype)).contiguous()
            )
    with _appearing_whole(folder) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        config = _peft_config(adapter, base_model_name_or_path)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _peft_config(adapter: AdapterState, base_model_name_or_path: str) -> dict[str, object]:
    ranks = {path: factors.rank for path, factors in adapter.items()}
    alphas = {path: _lora_alpha(factors) for path, factors in adapter.items()}
    rank, lora_alpha = _most_common(ranks), _most_common(alphas)
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
        "peft_version": peft.__version__,
        "r": rank,
        "rank_pattern": {_only(path): own for path, own in ranks.items() if own != rank},
        "target_modules": sorted(adapter),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _most_common(values: Mapping[str, Number]) -> Number:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], value))


def _only(path: str) -> str:
    """Return the pattern that PEFT matches with this module and no other: it searches for regular expressions."""
    return f"^{re.escape(path)}"


def _lora_alpha(factors: LoraFactors) -> int | float:
    """Return the alpha that divided by the rank is the scaling, whole where that is exact."""
    alpha = factors.scaling * factors.rank
    return round(alpha) if round(alpha) / factors.rank == factors.scaling else alpha


def read_adapter(folder: Path | str) -> AdapterState:
    """Return the adapter of a PEFT folder; its tensors are mapped from the file, not copied.

    Raises:
        AdapterError: If files are missing or broken, or the adapter is more than plain LoRA on linear modules.
    """
    folder = Path(folder)
    config = _read_config(folder)
    adapter: dict[str, LoraFactors] = {}
    with _open_weights(folder / WEIGHTS_FILE) as weights:
        keys = {key: _KEY.fullmatch(key) for key in weights.keys()}
        strange = next((key for key, match in keys.items() if match is None), None)
        if strange is not None:
            raise AdapterError(f"{folder}: only LoRA factors of linear modules can be read; found {strange}")
        for path in sorted({match["path"] for match in keys.values() if match}):
            names = [f"base_model.model.{path}.lora_{name}.weight" for name in ("A", "B")]
            if not keys.keys() >= set(names):
                raise AdapterError(f"{folder}: {path} must have both lora_A and lora_B; one is missing")
            A, B = (weights.get_tensor(name) for name in names)
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
                raise AdapterError(f"{folder}: {path} has factors {tuple(B.shape)} and {tuple(A.shape)}, not a product")
            adapter[path] = LoraFactors(A, B, _scaling(config, path, A.shape[0]))
    if not adapter:
        raise AdapterError(f"{folder}: {WEIGHTS_FILE} holds no factors")
    return adapter


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / CONFIG_FILE
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"{folder} must be a PEFT adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} must be JSON: {error}") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type must be LORA; got {config.get('peft_type')}")
    extra = [name for name in ("use_dora", "lora_bias", "alora_invocation_tokens") if config.get(name)]
    if extra:
        raise AdapterError(f"{path}: only plain LoRA can be read; it sets {', '.join(extra)}")
    return config


@contextmanager
def _open_weights(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}") from error


def _scaling(config: Mapping[str, object], path: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    assert isinstance(patterns, dict)
    # As PEFT looks patterns up: the first that matches the end of the path from a dot on.
    lora_alpha = next(
        (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)),
        config.get("lora_alpha"),
    )
    if not isinstance(lora_alpha, int | float):
        raise AdapterError(f"{CONFIG_FILE}: lora_alpha must be a number; got {lora_alpha!r}")
    return lora_alpha / (rank**0.5 if config.get("use_rslora") else rank)


def merge_into_base(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapter: AdapterState, folder: Path | str
) -> None:
    """Add ``adapter`` to the weights of ``base``, in memory too, and write model and tokenizer as one folder.

    Sums are formed in float64 and rounded once to the dtype of the weights.

    Raises:
        AdapterError: If ``folder`` holds something, or a module does not exist or shares its weight with another.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise AdapterError(f"{folder} must be new or empty; it holds files")
    weights = {path: _own_weight(base, path) for path in sorted(adapter)}
    with torch.no_grad():
        for path, weight in weights.items():
            delta = adapter[path].delta().to(weight.device)
            is_transposed = isinstance(base.get_submodule(path), Conv1D)
            weight.copy_(weight.to(torch.float64) + (delta.T if is_transposed else delta))
    with _appearing_whole(folder) as partial:
        base.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def _own_weight(base: PreTrainedModel, path: str) -> Tensor:
    weights = dict(base.named_parameters(remove_duplicate=False))
    weight = weights.get(f"{path}.weight")
    if weight is None:
        raise AdapterError(f"{path}: the base model has no such module with a weight")
    sharing = [name for name, other in weights.items() if other is weight and name != f"{path}.weight"]
    if sharing:
        raise AdapterError(f"{path}: its weight is also {', '.join(sharing)}, which merging would change too")
    return weight


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a ``with`` block a folder to fill that takes the name ``folder`` when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        partial = workspace / "new"
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            _flush(path)
        _flush(partial)
        if folder.exists():
            folder.rename(workspace / "old")
        partial.rename(folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
