"""Reads the header of a PEFT weights file and refuses tensors that are no factors of linear modules or embeddings."""

import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open

from flexlora.adapters.pattern_names import looked_up
from flexlora.adapters.peft_format import CONFIG_FILE, INTO_THE_BASE, WEIGHTS_FILE, AdapterError
from flexlora.adapters.peft_settings import STORED, WHOLE_WEIGHTS, numbers_of, trained_whole
from flexlora.adapters.stored_names import StoredName, is_renamed, stored_names

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that factors may be stored in, as safetensors names them."""


EMBEDDINGS = frozenset("embed_in embed_out embed_tokens lm_head shared tok_embeddings word_embeddings wte".split())
"""Names of the input and output embeddings, of which PEFT saves untrained copies (``save_embedding_layers``)."""


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The factors of one module as the header describes them; an embedding's change is stored transposed.

    Attributes:
        shape: Of the change.
        rank: Of the factors.
        scaling: Of their product.
        is_embedding: Whether it is one.
        keys: Of ``A`` and ``B`` in the file.
    """

    shape: tuple[int, int]
    rank: int
    scaling: float
    is_embedding: bool
    keys: tuple[str, str]


@dataclass(frozen=True, slots=True)
class StoredCopy:
    """Whole weights of one module as the header describes them.

    Attributes:
        shape: Rows and columns.
        keys: In the file: ``weight``, ``base_layer.weight``, or both.
    """

    shape: tuple[int, int]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """What a weights file holds.

    Attributes:
        modules: Module path -> its factors, sorted.
        copies: Module path -> the whole weights stored beside factors.
        is_renamed: Whether paths were freed of what tools for training wrap around modules.
    """

    modules: Mapping[str, StoredModule]
    copies: Mapping[str, StoredCopy]
    is_renamed: bool


def read_header(weights: safe_open, config: Mapping[str, Any], name: str) -> Header:
    """Return what the open file of an adapter called ``name`` holds.

    Raises:
        AdapterError: If a tensor is no factor of a linear module or an embedding, nor a copy of an embedding.
    """
    names = stored_names(weights.keys())
    factors: dict[str, dict[str, str]] = {}
    embeddings, found = set(), {}
    for key, stored in names.items():
        if stored is None or stored.letter is None:
            continue
        path = sys.intern(stored.path)
        pair = factors.setdefault(path, {})
        if stored.letter in pair or (pair and stored.is_embedding != (path in embeddings)):
            raise AdapterError(f"{name}: {_twice(path, stored, embeddings)}")
        pair[stored.letter], found[path] = key, stored
        if stored.is_embedding:
            embeddings.add(path)
    copies = _copies(weights, names, embeddings, config, name)
    if not factors:
        raise AdapterError(f"{name}: {WEIGHTS_FILE} holds no factors")
    paths = tuple(sorted(factors))
    shapes = {path: _pair_shapes(weights, path, factors[path], name) for path in paths}
    names_looked_up = looked_up(
        config, {path: found[path] for path in paths}, [shapes[path][0][0] for path in paths], name
    )
    ranks = numbers_of(config, "r", "rank_pattern", names_looked_up, name)
    alphas = numbers_of(config, "lora_alpha", "alpha_pattern", names_looked_up, name)
    modules = {}
    for path, rank, lora_alpha in zip(paths, ranks, alphas, strict=True):
        (stored, in_features), (out_features, _) = shapes[path]
        if rank != stored:
            raise AdapterError(f"{name}: {_wrong_rank(path, stored, rank)}")
        scaling = lora_alpha / (stored**0.5 if config.get("use_rslora") else stored)
        keys = factors[path]["A"], factors[path]["B"]
        modules[path] = StoredModule((out_features, in_features), stored, scaling, path in embeddings, keys)
    for path, copy in copies.items():
        check_rows(path, copy, modules.get(path), name, name)
    return Header(modules, copies, is_renamed(names))


def check_rows(path: str, copy: StoredCopy, module: StoredModule | None, copied_by: str, adapted_by: str) -> None:
    """Raise unless factors of a module fit a copy of its weight: PEFT could load only one of them.

    Args:
        path: Of the module.
        copy: Of its weight.
        module: Its factors, None if there are none.
        copied_by: Name of the adapter with the copy.
        adapted_by: Name of the adapter with the factors.

    Raises:
        AdapterError: Naming both shapes.
    """
    if module is None:
        return
    fitting = module.shape[::-1] if module.is_embedding else module.shape
    if copy.shape != fitting:
        raise AdapterError(
            f"{path} must have one shape in whole weights and factors; {copied_by} holds it whole with "
            f"{copy.shape[0]}x{copy.shape[1]} and {adapted_by} has factors for {fitting[0]}x{fitting[1]}: they belong "
            "to bases of different vocabularies; save them from one"
        )


def _twice(path: str, stored: StoredName, embeddings: Container[str]) -> str:
    """Return why a module must not have two factors of one letter."""
    if stored.is_embedding != (path in embeddings):
        return f"{path} has factors of a linear module and of an embedding; it can be one only"
    return f"{path} is stored twice, with and without what torch.compile or FSDP wraps around it; leave one"


def _wrong_rank(path: str, stored: int, rank: float) -> str:
    """Return what is wrong with factors of another rank than the configuration says."""
    message = f"{path} has factors of rank {stored}, but {CONFIG_FILE} says {rank:g}"
    if path.rpartition(".")[2] == "experts" and rank > 0 and stored % rank == 0:
        message += f", as if {stored // rank:g} experts were stacked, which is not handled; {INTO_THE_BASE}"
    return message


def _copies(
    weights: safe_open,
    names: Mapping[str, StoredName | None],
    embeddings: Container[str],
    config: Mapping[str, Any],
    name: str,
) -> dict[str, StoredCopy]:
    """Return module path -> its whole weights, which must be untrained."""
    found: dict[str, StoredCopy] = {}
    for key, stored in names.items():
        if stored is not None and stored.letter is not None:
            continue
        _check_copy(key, stored, embeddings, config, name)
        assert stored is not None
        described = weights.get_slice(key)
        shape, dtype = tuple(described.get_shape()), described.get_dtype()
        if dtype not in FLOATS or len(shape) != 2 or 0 in shape:
            raise AdapterError(
                f"{name}: {key} must be a matrix stored in {', '.join(sorted(FLOATS))}; got {dtype} of shape "
                f"{list(shape)}"
            )
        before = found.get(stored.path)
        if before is not None and before.shape != shape:
            raise AdapterError(f"{name}: {before.keys[0]} and {key} hold one weight with two shapes; leave one")
        found[stored.path] = StoredCopy(shape, (*(before.keys if before else ()), key))
    return found


def _check_copy(
    key: str, stored: StoredName | None, embeddings: Container[str], config: Mapping[str, Any], name: str
) -> None:
    """Raise unless ``key`` is a whole weight that PEFT saves beside factors untrained: that of an embedding.

    Args:
        embeddings: Paths of those with factors of their own.
    """
    if stored is None:
        raise AdapterError(f"{name}: {_unknown(key)}")
    last = stored.path.rpartition(".")[2]
    is_copy = last in EMBEDDINGS or (stored.under_factors and stored.path in embeddings)
    if not is_copy or trained_whole(config, stored.path):
        raise AdapterError(f"{name}: it holds {key}: {WHOLE_WEIGHTS}")


def _unknown(key: str) -> str:
    """Return what a key that is neither a factor nor a whole weight gives away."""
    if ".base_layer." in key and "lora_" in key:
        return (
            f"{key} belongs to LoRA inside a layer with LoRA, as on nn.MultiheadAttention, which is not handled; "
            f"{INTO_THE_BASE}"
        )
    for part, reason in STORED.items():
        if key.endswith(part) or f"{part}." in key:
            return f"it holds {key}: {reason}"
    return (
        "only LoRA factors of linear modules and embeddings can be read, under the names that PEFT's save_pretrained "
        f"gives them; found {key}"
    )


def _pair_shapes(
    weights: safe_open, path: str, keys: Mapping[str, str], name: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of ``A`` and ``B``, which must be matrices with a product."""
    for key in keys.values():
        dtype = weights.get_slice(key).get_dtype()
        if dtype not in FLOATS:
            raise AdapterError(f"{name}: {key} must be stored in {', '.join(sorted(FLOATS))}; got {dtype}")
    if keys.keys() != {"A", "B"}:
        raise AdapterError(f"{name}: {path} must have both lora_A and lora_B; one is missing")
    A, B = (tuple(weights.get_slice(keys[letter]).get_shape()) for letter in "AB")
    if len(A) > 2 or len(B) > 2:
        raise AdapterError(f"{name}: {path} {_more_axes(A, B)}; {INTO_THE_BASE}")
    if len(A) != 2 or len(B) != 2 or A[0] != B[1] or 0 in (*A, *B):
        raise AdapterError(f"{name}: {path} has factors {B} and {A}, not a product; was it saved from one shard?")
    return A, B


def _more_axes(A: Shape, B: Shape) -> str:
    """Return what factors of more than two axes are, where their shapes leave no doubt."""
    is_convolution = len(A) == len(B) and A[0] == B[1] and set(B[2:]) == {1}
    is_stack = len(A) == len(B) == 3 and A[0] == B[0] and A[1] == B[2]
    if is_convolution and not is_stack:
        return "is LoRA on a convolution, which is not handled"
    if is_stack and not is_convolution:
        return f"holds the stacked factors of {A[0]} experts, which are not handled"
    return f"has factors {B} and {A}, which are no matrices"
