"""Reads the header of a PEFT weights file and refuses tensors that are no factors of linear modules or embeddings."""

import re
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open

from flexlora.adapters.peft_format import CONFIG_FILE, INTO_THE_BASE, WEIGHTS_FILE, AdapterError
from flexlora.adapters.peft_settings import REFUSED, numbers_of

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that factors may be stored in, as safetensors names them."""


EMBEDDINGS = frozenset("embed_in embed_out embed_tokens lm_head shared tok_embeddings word_embeddings wte".split())
"""Names of the input and output embeddings, of which PEFT saves untrained copies (``save_embedding_layers``)."""


_FACTOR = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))"
)


_WHOLE = re.compile(r"base_model\.model\.(?P<path>(?:(?!\blora_).)+?)(?P<under_factors>\.base_layer)?\.weight")


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The factors of one module as the header describes them; an embedding's change is stored transposed."""

    shape: tuple[int, int]
    rank: int
    scaling: float
    is_embedding: bool


def read_header(
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
    ranks = numbers_of(config, "r", "rank_pattern", paths, name)
    alphas = numbers_of(config, "lora_alpha", "alpha_pattern", paths, name)
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
            f"which is not handled; {INTO_THE_BASE}"
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
        raise AdapterError(f"{name}: {path} is LoRA on a convolution, which is not handled; {INTO_THE_BASE}")
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or 0 in (*A, *B):
        raise AdapterError(f"{name}: {path} has factors {B} and {A}, not a product; was it saved from one shard?")
