"""Checks that adapters change one model in one way, and finds what they have in common."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

from flexlora.adapters.folder import AdapterFolder, locate_adapter, open_adapter
from flexlora.adapters.peft_format import AdapterError

MOST_PROBLEMS = 10
"""Problems reported at once when many adapters cannot be read."""


ADDED_ANYWHERE = frozenset("_checkpoint_wrapped_module _fsdp_wrapped_module _orig_mod module".split())
"""Parts of a path that tools for training add around a module."""


ADDED_IN_FRONT = ADDED_ANYWHERE | frozenset(
    "base_model bert distilbert electra gpt_neox language_model model roberta transformer".split()
)
"""Parts before the blocks that come, go and change places with the class of a model and the version of transformers."""


_BLOCK_NUMBER = re.compile(r"(?:^|\.)\d+(?=\.)")


class MergeError(AdapterError):
    """Adapters that cannot be combined as asked."""


def open_adapters(names: Sequence[str], stack: ExitStack) -> list[AdapterFolder]:
    """Return the adapters, opened, or report what is wrong with all of them at once."""
    opened, problems = [], []
    for name in names:
        try:
            opened.append(stack.enter_context(open_adapter(locate_adapter(name), name)))
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - MOST_PROBLEMS
        raise AdapterError("\n".join([*problems[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]))
    return opened


def check_together(opened: Sequence[AdapterFolder], allow_different_bases: bool) -> list[str]:
    """Raise unless the adapters change one model in one way; return notes for the user."""
    notes = _check_bases(opened, allow_different_bases)
    replications = _first_of_each(opened, lambda adapter: str(adapter.settings["layer_replication"]))
    if len(replications) > 1:
        one, other = list(replications.values())[:2]
        raise MergeError(f"layer_replication must be the same in all adapters; {one.name} and {other.name} differ")
    _check_shapes(opened)
    _check_names(opened)
    folders = Counter(os.path.realpath(adapter.name) for adapter in opened)
    notes += [
        f"{folder} was given {count} times; each of them counts" for folder, count in folders.items() if count > 1
    ]
    copies = sorted({key for adapter in opened for key in adapter.copies})
    if copies:
        notes.append(f"whole weights saved beside the factors were taken over as they are: {', '.join(copies)}")
    return notes


def _check_bases(opened: Sequence[AdapterFolder], allow_different_bases: bool) -> list[str]:
    bases = _first_of_each(opened, lambda adapter: adapter.base)
    nameless = bases.pop(None, None)
    notes = []
    if len(bases) > 1:
        named = " and ".join(f"{base} ({adapter.name})" for base, adapter in list(bases.items())[:2])
        if not allow_different_bases:
            raise MergeError(
                f"adapters must share one base model; got {named}: if these are the same weights under two names, "
                "use --allow-different-bases"
            )
        notes.append(f"the adapters name different base models, {named}; the result names the first")
    if nameless is not None:
        notes.append(f"{nameless.name} does not say which base model it belongs to")
    return notes


def _check_shapes(opened: Sequence[AdapterFolder]) -> None:
    first: dict[str, AdapterFolder] = {}
    for adapter in opened:
        for path, module in adapter.modules.items():
            known = first.setdefault(path, adapter)
            expected = known.modules[path]
            if module.is_embedding != expected.is_embedding:
                one, other = (known, adapter) if expected.is_embedding else (adapter, known)
                raise MergeError(
                    f"{path} must be of one kind in all adapters; {one.name} has it as an embedding and {other.name} "
                    "as a linear module: they belong to different base models"
                )
            if module.shape != expected.shape:
                raise MergeError(
                    f"{path} must have one shape in all adapters; {known.name} has {_shape_text(expected.shape)} and "
                    f"{adapter.name} has {_shape_text(module.shape)}: they belong to different base models"
                )


def _check_names(opened: Sequence[AdapterFolder]) -> None:
    """Raise if adapters seem to call one module by two names: PEFT would load what is written under one of them only.

    Two paths are suspected if they differ in parts that are added around a module, and no adapter tells them apart by
    having modules under both.
    """
    having: dict[str, AdapterFolder] = {}
    for adapter in opened:
        for path in adapter.modules:
            having.setdefault(path, adapter)
    alike: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(having):
        alike.setdefault(_essential(path), []).append(path)
    for one, other in (pair for paths in alike.values() for pair in combinations(paths, 2)):
        shapes = [having[path].modules[path].shape for path in (one, other)]
        if shapes[0] == shapes[1] and not any(_tells_apart(adapter, one, other) for adapter in opened):
            raise MergeError(
                f"adapters must name modules alike; {one} ({having[one].name}) and {other} ({having[other].name}) look "
                "like one module under two names: load each adapter on its base with current PEFT and transformers and "
                "save it again, or rename the keys of one"
            )


def _essential(path: str) -> tuple[str, ...]:
    """Return the parts of a path without those that are added around a module."""
    *parts, name = path.split(".")
    front = _front(path).count(".") + 1
    kept = [part for part in parts[:front] if part not in ADDED_IN_FRONT]
    return (*kept, *(part for part in parts[front:] if part not in ADDED_ANYWHERE), name)


@lru_cache(maxsize=1 << 16)  # adapters of one run share modules
def _front(path: str) -> str:
    """Return what comes before the number of the block a module is in, the whole path outside blocks."""
    match = _BLOCK_NUMBER.search(path)
    return path[: match.start()] if match else path


def _tells_apart(adapter: AdapterFolder, one: str, other: str) -> bool:
    """Return whether an adapter has modules under both names, or under both of what precedes the blocks in them."""
    fronts = {_front(one), _front(other)}
    if len(fronts) == 1:
        return one in adapter.modules and other in adapter.modules
    return fronts <= {_front(path) for path in adapter.modules}


def _first_of_each(
    opened: Sequence[AdapterFolder], value: Callable[[AdapterFolder], str | None]
) -> dict[str | None, AdapterFolder]:
    found: dict[str | None, AdapterFolder] = {}
    for adapter in opened:
        found.setdefault(value(adapter), adapter)
    return found


def _shape_text(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def common_copy(opened: Sequence[AdapterFolder], key: str) -> Tensor:
    """Return a whole weight that all adapters which have it agree on to the bit."""
    having = [adapter for adapter in opened if key in adapter.copies]
    copy = having[0].copy(key)
    for other in having[1:]:
        theirs = other.copy(key)
        if theirs.dtype != copy.dtype or not torch.equal(theirs, copy):
            raise MergeError(
                f"{key} is a whole weight saved beside the factors, and {having[0].name} and {other.name} hold "
                "different ones: save the adapters with save_embedding_layers=False if it was not trained"
            )
    return copy


def named_base(opened: Sequence[AdapterFolder]) -> AdapterFolder:
    """Return the first adapter that says which base model it belongs to, or the first."""
    return next((adapter for adapter in opened if adapter.base_model), opened[0])


def common_targets(opened: Iterable[AdapterFolder], paths: tuple[str, ...]) -> list[str] | None:
    """Return the short names that all modules were chosen by, or None if they do not tell exactly which.

    Every adapter holds all modules of the base model that its names match, so the union of the names matches the union
    of the modules and no other module of the base model, which is not at hand. Unlike full paths, short names also find
    modules whose path has been changed since, and other tools than PEFT expect them.
    """
    names: set[str] = set()
    for adapter in opened:
        if adapter.target_modules is None or _matching(adapter.target_modules, paths) != adapter.modules.keys():
            return None
        names.update(adapter.target_modules)
    return sorted(names)


@lru_cache(maxsize=64)  # adapters of one run share names
def _matching(targets: tuple[str, ...], paths: tuple[str, ...]) -> frozenset[str]:
    suffixes = tuple(f".{target}" for target in targets)
    return frozenset(path for path in paths if path in targets or path.endswith(suffixes))
