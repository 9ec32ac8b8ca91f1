"""Finds the configuration that a call from Python names, and applies settings given as keywords."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from flexlora.experiment.config import Config
from flexlora.experiment.config_data import CommonData
from flexlora.experiment.config_file import DEMO_FILE, parse_config, read_settings
from flexlora.experiment.config_path import DEMO
from flexlora.experiment.setting_hints import setting_names, word_meant

# Sections with a variant for each name, and the name they have by default.
VARIANTS = {"data": "generated", "method": "flexlora"}
# What stays when a section changes its variant: settings that mean the same whatever the data are.
SHARED = {"data": CommonData.model_fields.keys() - {"num_clients", "cache"}, "method": frozenset[str]()}

ConfigSource: TypeAlias = str | os.PathLike[str] | Mapping[str, object] | Config
"""``demo``, the path of a YAML file, a mapping of sections, or a configuration."""


def config_from(source: ConfigSource, settings: Mapping[str, object]) -> Config:
    """Return the configuration that ``source`` names, with settings replaced.

    Args:
        source: ``"demo"`` is the one that comes with the package.
        settings: Key -> value. A key is that of the configuration with double underscores or dots between its parts
            (``rounds__num_rounds``). A mapping under the name of a section replaces the settings it holds, and the
            whole section if it has another ``name``.

    Raises:
        ConfigError: With every problem found, each naming key, value and rule.
    """
    if isinstance(source, Config):
        tree, name = source.model_dump(mode="json", exclude_unset=True), "the configuration"
    elif isinstance(source, Mapping):
        tree, name = _plain(source), "the configuration"
    elif source == DEMO:
        tree, name = read_settings(DEMO_FILE), "the demo"
    else:
        tree, name = read_settings(Path(source)), str(source)
    problems = [problem for key, value in _joined(settings).items() for problem in _apply(tree, key, value)]
    if settings:
        name += f" with {len(settings)} override{'s' if len(settings) > 1 else ''}"
    return parse_config(tree, name, problems, check_paths=True)


def name_of_source(source: ConfigSource) -> str:
    """Return a short name for runs of this configuration."""
    return Path(source).stem if isinstance(source, str | os.PathLike) else "run"


def _joined(settings: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings as plain values, those of a section with variants as one mapping, whatever their order.

    ``method__path`` before ``method__name`` would otherwise be lost with the section that the new name replaces.
    """
    joined: dict[str, Any] = {}
    for key, value in settings.items():
        first, *rest = re.split(r"__|\.", key)
        given = {rest[0]: value} if len(rest) == 1 else value
        if (
            first in VARIANTS
            and len(rest) < 2
            and isinstance(given, Mapping)
            and isinstance(joined.get(first, {}), dict)
        ):
            joined[first] = {**joined.get(first, {}), **_plain(given)}
        else:
            joined[key] = _plain(value)
    return joined


def _is_another(first: str, section: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Return whether settings choose another variant of a section: another name, or a file with a method of its own."""
    if first == "method" and "name" not in given and given.get("path") not in (None, section.get("path")):
        return True
    name = section.get("name", VARIANTS[first])
    return given.get("name", name) != name


def _apply(tree: dict[str, Any], key: str, value: Any) -> Iterator[str]:
    """Set one key, or yield why that cannot be."""
    first, *rest = re.split(r"__|\.", key)
    if first not in Config.model_fields:
        yield f"{key}: there is no such setting; {_hint(key)}"
    elif not rest and not isinstance(value, dict):
        tree[first] = value
    else:
        section = tree.get(first)
        if section is None:
            section = {}
        if not isinstance(section, dict):
            yield f"{key}: {first} is {section!r}, not a section"
            return
        given = value if not rest else {rest[0]: value} if len(rest) == 1 else {}
        if first in VARIANTS and _is_another(first, section, given):
            section = {name: own for name, own in section.items() if name in SHARED[first]}
        tree[first] = section = {**section, **given}
        if len(rest) > 1:
            yield from _apply_deep(section, key, rest, value)


def _apply_deep(section: dict[str, Any], key: str, path: list[str], value: Any) -> Iterator[str]:
    node = section
    for part in path[:-1]:
        # A copy: the mapping that was given is not ours to change.
        child = node[part] = dict(node[part]) if isinstance(node.get(part), dict) else node.get(part) or {}
        if not isinstance(child, dict):
            yield f"{key}: {part} is {child!r}, not a section"
            return
        node = child
    node[path[-1]] = value


def _hint(key: str) -> str:
    """Return what a key that does not exist may have meant."""
    if meant_by_word := word_meant(re.sub("__", ".", key)):
        return meant_by_word
    known = {name.replace(".", "__", 1) for name in setting_names()}
    meant = sorted(name for name in known if key in (name.partition("__")[2], name.replace("__", "_")))
    near = difflib.get_close_matches(key, [*known, *Config.model_fields], n=1)
    if meant or near:
        return f"did you mean {' or '.join(meant or near)}?"
    return f"known keys here: {', '.join(sorted(Config.model_fields))}; write SECTION__SETTING=VALUE"


def _plain(value: Any) -> Any:
    """Return a value as YAML would have given it: plain containers, numbers and texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [_plain(own) for own in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
