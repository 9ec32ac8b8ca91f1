"""Checks that adapters change one model in one way, and finds what they have in common."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

from flexlora.adapters.copies import check_copies, copied_paths
from flexlora.adapters.folder import AdapterFolder, locate_adapter, open_adapter
from flexlora.adapters.module_names import check_names
from flexlora.adapters.peft_format import CONFIG_FILE, AdapterError, MergeError
from flexlora.adapters.stored_names import doubtful_part

MOST_PROBLEMS = 10
"""Problems reported at once when many adapters cannot be read."""


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
        raise AdapterError(*problems[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else []))
    return opened


def check_together(opened: Sequence[AdapterFolder], allow_different_bases: bool) -> list[str]:
    """Raise unless the adapters change one model in one way; return notes for the user."""
    notes = _check_bases(opened, allow_different_bases)
    replications = _first_of_each(opened, lambda adapter: str(adapter.settings["layer_replication"]))
    if len(replications) > 1:
        one, other = list(replications.values())[:2]
        raise MergeError(f"layer_replication must be the same in all adapters; {one.name} and {other.name} differ")
    _check_shapes(opened)
    check_names(opened)
    check_copies(opened)
    notes += _contradictions(opened)
    folders = Counter(os.path.realpath(adapter.name) for adapter in opened)
    notes += [
        f"{folder} was given {count} times; each of them counts" for folder, count in folders.items() if count > 1
    ]
    for adapter in opened:
        if adapter.is_renamed:
            notes.append(f"{adapter.name}: what torch.compile, FSDP or DataParallel put around modules was taken out")
        doubtful = next(((path, part) for path in adapter.modules if (part := doubtful_part(path))), None)
        if doubtful is not None:
            notes.append(
                f"{adapter.name}: {doubtful[1]} in {doubtful[0]} may be what a tool put around modules; if the base "
                "has no such part, PEFT loads these factors nowhere: take it out of the names of the tensors"
            )
    if copies := copied_paths(opened):
        notes.append(f"whole weights saved beside the factors were taken over as they are: {', '.join(copies)}")
    return notes


def _check_bases(opened: Sequence[AdapterFolder], allow_different_bases: bool) -> list[str]:
    bases = _first_of_each(opened, lambda adapter: adapter.base)
    nameless = bases.pop(None, None)
    notes = [
        f"the base model is named by the folder {adapter.base_model}, which other machines lack; load it there yourself"
        for adapter in list(bases.values())[:1]
        if adapter.base_model is not None and Path(adapter.base_model).is_absolute()
    ]
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


def _contradictions(opened: Sequence[AdapterFolder]) -> list[str]:
    """Return a note for each setting that adapters contradict one another in, which the result leaves out."""
    notes = []
    for key in ("task_type", "auto_mapping"):
        said = [adapter for adapter in opened if adapter.settings[key] is not None]
        other = next((adapter for adapter in said if adapter.settings[key] != said[0].settings[key]), None)
        if other is not None:
            one_text, other_text = (_setting_text(adapter.settings[key]) for adapter in (said[0], other))
            notes.append(
                f"{key} is {one_text} in {said[0].name} and {other_text} in {other.name}; the result has none: set it "
                f"in {CONFIG_FILE} if AutoPeftModel is to load it"
            )
    return notes


def _setting_text(value: object) -> str:
    """Return a setting as it is named in a note: a class of model by its name and module."""
    return ", ".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)


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


def _first_of_each(
    opened: Sequence[AdapterFolder], value: Callable[[AdapterFolder], str | None]
) -> dict[str | None, AdapterFolder]:
    found: dict[str | None, AdapterFolder] = {}
    for adapter in opened:
        found.setdefault(value(adapter), adapter)
    return found


def _shape_text(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def common_setting(opened: Sequence[AdapterFolder], key: str) -> Any:
    """Return what the adapters that say something about a setting agree on, None if they contradict one another."""
    said = [adapter.settings[key] for adapter in opened if adapter.settings[key] is not None]
    return said[0] if said and all(value == said[0] for value in said) else None


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
