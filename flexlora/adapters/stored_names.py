"""Reads what the keys of a PEFT weights file stand for, without what tools for training wrap around modules."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WRAPPERS = frozenset("_checkpoint_wrapped_module _fsdp_wrapped_module _orig_mod".split())
"""Parts of a path that torch.compile, FSDP and activation checkpointing add, and that no model has."""


DATA_PARALLEL = "module"
"""Part that DataParallel and its kin put in front of everything."""


_PREFIX = "base_model.model."


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


def is_wrapper(part: str) -> bool:
    """Return whether a part of a path is what a tool for training puts around a module."""
    return part in WRAPPERS


def stored_names(keys: Iterable[str]) -> dict[str, StoredName | None]:
    """Return key -> what it stands for, None where PEFT's ``save_pretrained`` writes no such key."""
    plain = {key: _without_wrappers(key) for key in keys}
    starts = {key.removeprefix(_PREFIX).split(".")[0] for key in plain.values() if key.startswith(_PREFIX)}
    # A model may have a part of that name; where it holds everything, it is a wrapper.
    is_wrapped = starts == {DATA_PARALLEL}
    return {key: _name_of(key, known, is_wrapped) for key, known in plain.items()}


def _without_wrappers(key: str) -> str:
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    return ".".join(parts[1:] if parts[:2] == [DATA_PARALLEL, "base_model"] else parts)


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
        name is not None and (not key.startswith(f"{_PREFIX}{name.path}.") or not WRAPPERS.isdisjoint(key.split(".")))
        for key, name in names.items()
    )
