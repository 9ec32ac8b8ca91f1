"""Reads what the keys of a PEFT weights file stand for, without what tools for training wrap around modules."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

_WRAPPER = re.compile(r"_(?:\w+_)?mod(?:ule)?")
"""Parts of a path that tools add and no model has, for they are private: torch.compile's ``_orig_mod``, FSDP's
``_fsdp_wrapped_module`` and ``_fpw_module``, Lightning's ``_forward_module``, Opacus' ``_module`` and their like."""


DATA_PARALLEL = "module"
"""Part that DataParallel and its kin put in front of everything."""


_HOLDERS = (
    # A block, an attention or MLP, and a whole model: each with what models have in it.
    (r"\d+", r"(?:self_?|cross_?)?att(?:n|ention)|mlp|ffn|feed_?forward|block_sparse_moe|mixer"),
    (
        r"(?:self_?|cross_?)?att(?:n|ention)|mlp|ffn|feed_?forward",
        r"\w+_proj|c_attn|c_fc|fc[12]|w[123qkvo]|query|key|value",
    ),
    (r"model|transformer|bert|roberta|gpt_neox", r"layers|h|blocks|encoder|decoder|embed_tokens|wte|embeddings"),
)
"""Patterns of a part and of those after ``module`` in it, in small letters: no model has ``module`` between them."""


_PREFIX = "base_model.model."


_HEADS = frozenset("bert gpt_neox lm_head model roberta transformer".split())
"""First parts of whole models: what another module holds as ``base_model.model`` begins with the parts of a body."""


_FACTOR = re.compile(r"(?P<path>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")


_WHOLE = re.compile(r"(?P<path>(?:(?!\blora_).)+?)(?P<under_factors>\.base_layer)?\.weight")


@dataclass(frozen=True, slots=True)
class StoredName:
    """What a key stands for.

    Attributes:
        path: Of its module in the base model.
        letter: ``A`` or ``B`` for a factor, None for a whole weight.
        is_embedding: Whether it is a factor of an embedding.
        under_factors: Whether it is the weight under factors (``base_layer``).
        given_path: The path as it stands in the key, which patterns of the configuration were matched with if modules
            were wrapped before they got factors.
    """

    path: str
    letter: str | None
    is_embedding: bool
    under_factors: bool
    given_path: str

    @property
    def front_path(self) -> str:
        """The path with those wrappers only that stand in front of everything."""
        own = self.path.split(".")
        first = self.given_path.split(".").index(own[0]) if own[0] in self.given_path.split(".") else 0
        return ".".join([*self.given_path.split(".")[:first], *own])


def stored_names(keys: Iterable[str]) -> dict[str, StoredName | None]:
    """Return key -> what it stands for, None where PEFT's ``save_pretrained`` writes no such key."""
    plain = {key: _without_wrappers(key) for key in keys}
    names = [key.removeprefix(_PREFIX) for key in plain.values() if key.startswith(_PREFIX)]
    while names and all(_is_doubled(name) for name in names):
        names = [name.removeprefix(_PREFIX) for name in names]
        plain = {key: _PREFIX + known.removeprefix(2 * _PREFIX) for key, known in plain.items()}
    # A model may have a part of that name; where it holds everything, it is a wrapper.
    is_wrapped = {name.split(".")[0] for name in names} == {DATA_PARALLEL}
    holders = _data_parallel(names)
    return {key: _name_of(key, _without_parallel(known, holders), is_wrapped) for key, known in plain.items()}


def is_wrapper(part: str) -> bool:
    """Return whether a part of a path is what a tool for training puts around a module."""
    return _WRAPPER.fullmatch(part) is not None


def _without_wrappers(key: str) -> str:
    parts = [part for part in key.split(".") if not is_wrapper(part)]
    while parts[:1] == [DATA_PARALLEL]:
        parts = parts[1:]
    return ".".join(parts)


def _is_doubled(name: str) -> bool:
    """Return whether a name inside a model begins as if PEFT had wrapped it twice."""
    first = name.removeprefix(_PREFIX).split(".")[0]
    return name.startswith(_PREFIX) and (first in _HEADS or name.startswith(2 * _PREFIX))


def _data_parallel(names: Iterable[str]) -> frozenset[str]:
    """Return the modules that surely hold nothing but what DataParallel or its kin wraps."""
    children: dict[str, set[str]] = {}
    inner: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            holder = ".".join(parts[:place])
            children.setdefault(holder, set()).add(part)
            if part == DATA_PARALLEL and place:
                inner.setdefault(holder, set()).add(parts[place + 1])
    return frozenset(
        holder
        for holder, found in inner.items()
        if children[holder] == {DATA_PARALLEL} and all(_is_known(holder.rpartition(".")[2], part) for part in found)
    )


def _is_known(outer: str, inner: str) -> bool:
    """Return whether models have a part called ``inner`` right in one called ``outer``."""
    return any(re.fullmatch(one, outer.lower()) and re.fullmatch(other, inner.lower()) for one, other in _HOLDERS)


def doubtful_part(path: str) -> str | None:
    """Return what a tool may have put into a path, where a model may have it as well."""
    if path.startswith(_PREFIX):
        return _PREFIX.rstrip(".")
    return DATA_PARALLEL if DATA_PARALLEL in path.split(".") else None


def _without_parallel(key: str, holders: Container[str]) -> str:
    """Return a key without ``module`` in ``holders``."""
    if not holders or not key.startswith(_PREFIX):
        return key
    parts = key.removeprefix(_PREFIX).split(".")
    kept = [
        part
        for place, part in enumerate(parts)
        if not (part == DATA_PARALLEL and place and ".".join(parts[:place]) in holders)
    ]
    return _PREFIX + ".".join(kept)


def _name_of(key: str, plain: str, is_wrapped: bool) -> StoredName | None:
    if not plain.startswith(_PREFIX):
        return None
    name = plain.removeprefix(_PREFIX)
    if is_wrapped:
        name = name.removeprefix(f"{DATA_PARALLEL}.")
    given = key.partition(_PREFIX)[2] or name
    if (match := _FACTOR.fullmatch(name)) is not None:
        if "base_layer" in match["path"].split("."):
            return None
        ending = name.removeprefix(match["path"])
        given = given.removesuffix(ending)
        letter, is_embedding = match["linear"] or match["embedding"], bool(match["embedding"])
        return StoredName(match["path"], letter, is_embedding, False, given)
    if (match := _WHOLE.fullmatch(name)) is not None:
        return StoredName(match["path"], None, False, bool(match["under_factors"]), given)
    return None


def is_renamed(names: Mapping[str, StoredName | None]) -> bool:
    """Return whether any key had wrappers in it."""
    return any(
        name is not None
        and (not key.startswith(f"{_PREFIX}{name.path}.") or any(is_wrapper(part) for part in key.split(".")))
        for key, name in names.items()
    )
