"""What a PEFT adapter folder holds, and whether its factors mean what ``scaling * B @ A`` says.

Opening a folder reads its configuration and the header of its weights. Whatever would make the factors mean something
else is refused by name here; what is left can be added up.
"""

import json
import re
import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.lora.factors import AdapterState, LoraFactors

CONFIG_FILE = "adapter_config.json"


WEIGHTS_FILE = "adapter_model.safetensors"


PICKLE_FILE = "adapter_model.bin"


FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that factors may be stored in, as safetensors names them."""


EMBEDDINGS = frozenset("embed_in embed_out embed_tokens lm_head shared tok_embeddings word_embeddings wte".split())
"""Names of the input and output embeddings, of which PEFT saves untrained copies (``save_embedding_layers``)."""


_INTO_THE_BASE = "merge it into its base model instead (merge_and_unload in PEFT)"


REFUSED = {
    "alora_invocation_tokens": f"aLoRA is active only after its invocation tokens; {_INTO_THE_BASE}",
    "arrow_config": "Arrow chooses between adapters at every token; merge the adapters that it routes to",
    "kasa_config": f"KaSA changes the base weights too; {_INTO_THE_BASE}",
    "lora_bias": f"a bias behind lora_B is no part of B @ A; {_INTO_THE_BASE}",
    "megatron_config": "factors of Megatron layers are stored in parts; save it from a model that is in one piece",
    "modules_to_save": f"whole weights were trained beside the factors; {_INTO_THE_BASE}",
    "monteclora_config": f"MonteCLoRA samples around its factors; {_INTO_THE_BASE}",
    "target_parameters": f"factors of stacked experts are no product of two matrices; {_INTO_THE_BASE}",
    "trainable_token_indices": f"single token embeddings were trained beside the factors; {_INTO_THE_BASE}",
    "use_bdlora": f"BD-LoRA stores block-diagonal factors; {_INTO_THE_BASE}",
    "use_dora": f"DoRA rescales the columns of the whole weight; {_INTO_THE_BASE}",
    "use_qalora": f"QA-LoRA pools its inputs; {_INTO_THE_BASE}",
    "velora_config": "VeLoRA keeps training state among the weights; save it from PEFT as plain LoRA",
}
"""Setting -> why an adapter that sets it is no sum of products, and what to do instead."""


UNDERSTOOD = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layer_replication layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core peft_type peft_version "
    "qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora".split()
)
"""Settings that are either read here or say nothing about what the factors mean."""


Numbers = tuple[float, ...]


_PLAIN_STARTS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


_FACTOR = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


_WHOLE = re.compile(r"base_model\.model\.(?P<path>(?:(?!\blora_).)+?)(?P<under_factors>\.base_layer)?\.weight")


_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


class AdapterError(FlexLoraError, ValueError):
    """An adapter that cannot be written, read or merged."""


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The factors of one module as the header describes them; an embedding's change is stored transposed."""

    shape: tuple[int, int]
    rank: int
    scaling: float
    is_embedding: bool


@dataclass(frozen=True)
class AdapterFolder:
    """An opened adapter; nothing of its factors is in memory.

    Attributes:
        name: What the folder was called when it was asked for.
        base_model: Name or path of the base model, None where the adapter does not say.
        settings: ``auto_mapping``, ``fan_in_fan_out``, ``layer_replication``, ``revision`` of the base (None for its
            main one) and ``task_type``.
        target_modules: Names the modules were chosen by, None where they were chosen in a less simple way.
        modules: Module path -> its factors.
        copies: Keys of whole weights stored beside the factors: untrained embeddings, saved for convenience.
        weights: The open file.
    """

    name: str
    base_model: str | None
    settings: Mapping[str, Any]
    target_modules: tuple[str, ...] | None
    modules: Mapping[str, StoredModule]
    copies: tuple[str, ...]
    weights: safe_open

    @property
    def base(self) -> str | None:
        """The base model with its revision where one is named."""
        revision = self.settings["revision"]
        return f"{self.base_model}@{revision}" if self.base_model and revision else self.base_model

    def factors(self, path: str) -> LoraFactors:
        """Return the factors of a module, mapped from the file.

        Raises:
            AdapterError: If one holds NaN or infinity.
        """
        module = self.modules[path]
        A, B = (self._finite(key) for key in factor_keys(path, module.is_embedding))
        return LoraFactors(A, B, module.scaling)

    def copy(self, key: str) -> Tensor:
        """Return one of the whole weights in ``copies``, mapped from the file.

        Raises:
            AdapterError: If it holds NaN or infinity.
        """
        return self._finite(key)

    def _finite(self, key: str) -> Tensor:
        tensor = self.weights.get_tensor(key)
        # Unlike isfinite() over every entry, the extremes need no memory; NaN is an extreme.
        if not all(isfinite(float(extreme)) for extreme in torch.aminmax(tensor)):
            raise AdapterError(f"{self.name}: {key} must be finite; it holds NaN or infinity")
        return tensor


def factor_keys(path: str, is_embedding: bool = False) -> tuple[str, str]:
    """Return the keys of ``A`` and ``B`` in a PEFT file."""
    if is_embedding:
        return f"base_model.model.{path}.lora_embedding_A", f"base_model.model.{path}.lora_embedding_B"
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"


def is_expert(path: str) -> bool:
    """Return whether a module is one of several experts, which some versions of transformers fuse."""
    return _EXPERT.search(path) is not None


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a number that a float can hold; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def locate_adapter(name: str) -> Path:
    """Return the folder called ``name``, fetched from the Hugging Face hub if it is no local one but reads like an id.

    Raises:
        AdapterError: If the hub has no such adapter, or has it as a pickle only, or cannot be reached.
    """
    if Path(name).exists() or not _HUB_ID.fullmatch(name):
        return Path(name)
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
        is_pickle = not (folder / WEIGHTS_FILE).is_file() and huggingface_hub.file_exists(name, PICKLE_FILE)
    except Exception as error:  # the hub's errors have no base of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{name} is no local folder, and the hub did not give it ({reason})") from error
    if is_pickle:
        raise _pickle_error(name)
    return folder


@contextmanager
def open_adapter(folder: Path | str, name: str | None = None) -> Iterator[AdapterFolder]:
    """Give a ``with`` block the adapter of a PEFT folder.

    An open adapter holds a mapping of its file and no file descriptor, so thousands may be open.

    Args:
        folder: Where it lies.
        name: What to call it in messages; the folder if None.

    Raises:
        AdapterError: If files are missing or broken, or the adapter is more than LoRA on linear modules and embeddings.
    """
    folder = Path(folder)
    name = name or str(folder)
    config = _read_config(folder, name)
    # safetensors says of a file that must not be read that it is not there.
    (folder / WEIGHTS_FILE).open("rb").close()
    try:
        opened = safe_open(folder / WEIGHTS_FILE, framework="pt")
    except SafetensorError as error:
        raise AdapterError(f"{name}: {WEIGHTS_FILE} is not a whole safetensors file ({error})") from error
    with opened as weights:
        modules, copies = _read_header(weights, config, name)
        yield AdapterFolder(
            name=name,
            base_model=str(config.get("base_model_name_or_path") or "").rstrip("/") or None,
            settings={
                "auto_mapping": config.get("auto_mapping") or None,
                "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
                "layer_replication": config.get("layer_replication") or None,
                "revision": None if config.get("revision") in ("", "main") else config.get("revision"),
                "task_type": config.get("task_type"),
            },
            target_modules=_plain_targets(config),
            modules=modules,
            copies=copies,
            weights=weights,
        )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if path.is_file() and (folder / PICKLE_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise _pickle_error(name)
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(f"{name} must be a PEFT adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{name}: {CONFIG_FILE} must be JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{name}: {CONFIG_FILE} must hold one JSON object; got {type(config).__name__}")
    _refuse_settings(config, name)
    return config


def _pickle_error(name: str) -> AdapterError:
    return AdapterError(
        f"{name}: weights must be in {WEIGHTS_FILE}; {PICKLE_FILE} is a pickle, which can run code when it is read: "
        "load it with PEFT where you trust it and save it again"
    )


def _refuse_settings(config: Mapping[str, Any], name: str) -> None:
    """Raise unless every setting leaves the factors a plain product on an unchanged base."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{name}: peft_type must be LORA; got {config.get('peft_type')}")
    for key in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{name}: {key} must be text in {CONFIG_FILE}; got {config[key]!r}")
    for key in ("fan_in_fan_out", "use_rslora"):
        if config.get(key) and config[key] is not True:
            raise AdapterError(f"{name}: {key} must be true or false in {CONFIG_FILE}; got {config[key]!r}")
    if not isinstance(config.get("auto_mapping"), dict | None):
        raise AdapterError(
            f"{name}: auto_mapping must be an object or null in {CONFIG_FILE}; got {config['auto_mapping']!r}"
        )
    for key, value in sorted(config.items()):
        if value and key in REFUSED:
            raise AdapterError(f"{name}: it sets {key}: {REFUSED[key]}")
        if value and key not in UNDERSTOOD:
            raise AdapterError(
                f"{name}: it sets {key}, which is not known here; if that changes nothing about what the factors mean, "
                f"take it out of {CONFIG_FILE}"
            )
    if (config.get("bias") or "none") != "none":
        raise AdapterError(
            f"{name}: bias must be none; with {config['bias']} biases were trained beside the factors; {_INTO_THE_BASE}"
        )
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise AdapterError(
            f"{name}: init_lora_weights must leave the base as it is; {start} changes it at the start: save the "
            "adapter with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def _read_header(
    weights: safe_open, config: Mapping[str, Any], name: str
) -> tuple[dict[str, StoredModule], tuple[str, ...]]:
    """Return the modules, sorted, and the keys of whole weights."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    others, embeddings = [], set()
    for key in weights.keys():
        match = _FACTOR.fullmatch(key)
        described = weights.get_slice(key)
        if match is None or "base_layer" in match["path"].split("."):
            others.append(key)
            continue
        if described.get_dtype() not in FLOATS:
            raise AdapterError(
                f"{name}: {key} must be stored in {', '.join(sorted(FLOATS))}; got {described.get_dtype()}"
            )
        path, letter = sys.intern(match["path"]), match["linear"] or match["embedding"]
        if letter in shapes.setdefault(path, {}):
            raise AdapterError(f"{name}: {path} has factors of a linear module and of an embedding; it can be one only")
        shapes[path][letter] = tuple(described.get_shape())
        if match["embedding"]:
            embeddings.add(path)
    for key in others:
        _check_copy(key, weights, embeddings, name)
    if not shapes:
        raise AdapterError(f"{name}: {WEIGHTS_FILE} holds no factors")
    for path, pair in shapes.items():
        _check_pair(path, pair, name)
    paths = tuple(sorted(shapes))
    ranks = _per_module(config, "r", "rank_pattern", paths, name)
    alphas = _per_module(config, "lora_alpha", "alpha_pattern", paths, name)
    modules = {}
    for path, rank, lora_alpha in zip(paths, ranks, alphas, strict=True):
        (stored, in_features), (out_features, _) = shapes[path]["A"], shapes[path]["B"]
        if rank != stored:
            raise AdapterError(f"{name}: {path} has factors of rank {stored}, but {CONFIG_FILE} says {rank}")
        scaling = lora_alpha / (stored**0.5 if config.get("use_rslora") else stored)
        modules[path] = StoredModule((out_features, in_features), stored, scaling, path in embeddings)
    return modules, tuple(others)


def _check_copy(key: str, weights: safe_open, embeddings: Container[str], name: str) -> None:
    """Raise unless ``key`` is a whole weight that PEFT saves beside factors untrained: that of an embedding.

    Args:
        embeddings: Paths of those with factors of their own.
    """
    if _FACTOR.fullmatch(key):
        raise AdapterError(
            f"{name}: {key} belongs to LoRA inside a layer with LoRA, as on nn.MultiheadAttention, "
            f"which is not handled; {_INTO_THE_BASE}"
        )
    match = _WHOLE.fullmatch(key)
    if match is None:
        raise AdapterError(
            f"{name}: only LoRA factors of linear modules and embeddings can be read, under the names that PEFT's "
            f"save_pretrained gives them; found {key}"
        )
    path = match["path"]
    if path.rpartition(".")[2] not in EMBEDDINGS and not (match["under_factors"] and path in embeddings):
        raise AdapterError(f"{name}: it holds {key}: {REFUSED['modules_to_save']}")
    shape, dtype = weights.get_slice(key).get_shape(), weights.get_slice(key).get_dtype()
    if dtype not in FLOATS or len(shape) != 2 or 0 in shape:
        raise AdapterError(
            f"{name}: {key} must be a matrix stored in {', '.join(sorted(FLOATS))}; got {dtype} of shape {shape}"
        )


def _check_pair(path: str, pair: Mapping[str, tuple[int, ...]], name: str) -> None:
    if pair.keys() != {"A", "B"}:
        raise AdapterError(f"{name}: {path} must have both lora_A and lora_B; one is missing")
    A, B = pair["A"], pair["B"]
    if len(A) > 2 or len(B) > 2:
        raise AdapterError(f"{name}: {path} is LoRA on a convolution, which is not handled; {_INTO_THE_BASE}")
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or 0 in (*A, *B):
        raise AdapterError(f"{name}: {path} has factors {B} and {A}, not a product; was it saved from one shard?")


def _per_module(config: Mapping[str, Any], default: str, pattern: str, paths: tuple[str, ...], name: str) -> Numbers:
    """Return the number that applies to each of ``paths``: of ``pattern`` where one matches, else the ``default``."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{name}: {pattern} must map patterns to numbers; got {patterns!r}")
    named = {f"{pattern} of {key}": value for key, value in patterns.items()}
    for what, value in {default: config.get(default), **named}.items():
        if not is_number(value):
            raise AdapterError(f"{name}: {what} must be a number in {CONFIG_FILE}; got {value!r:.60}")
    try:
        return _matched(tuple(patterns.items()), config[default], paths)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{name}: {pattern} has a key that is no regular expression ({error})") from error


@lru_cache(maxsize=64)  # adapters of one run share patterns and modules
def _matched(patterns: tuple[tuple[str, float], ...], default: float, paths: tuple[str, ...]) -> Numbers:
    """Look up as PEFT does: the first pattern that matches the path from a dot on."""
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns]
    return tuple(next((value for regex, value in compiled if regex.match(path)), default) for path in paths)


def _plain_targets(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return ``target_modules`` where they are a list and nothing else chooses modules too."""
    targets = config.get("target_modules")
    others = [config.get(key) for key in ("exclude_modules", "layers_to_transform", "ensure_weight_tying")]
    # 0 is the first layer, not nothing.
    if not isinstance(targets, list) or any(value or (value == 0 and value is not False) for value in others):
        return None
    return tuple(sorted(str(target) for target in targets))


def read_adapter(folder: Path | str) -> AdapterState:
    """Return the adapter of a PEFT folder; its tensors are mapped from the file, not copied.

    Raises:
        AdapterError: If files are missing or broken, or the adapter is more than plain LoRA on linear modules.
    """
    with open_adapter(folder) as adapter:
        other = [*adapter.copies, *(path for path, module in adapter.modules.items() if module.is_embedding)]
        if other:
            raise AdapterError(f"{folder}: only LoRA factors of linear modules can be read; found {other[0]}")
        return {path: adapter.factors(path) for path in adapter.modules}
