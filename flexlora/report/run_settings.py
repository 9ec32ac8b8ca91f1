"""Reads the settings of runs for a comparison: what differs, and which runs differ in nothing but the seed."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexlora.foreign import ForeignError, read_yaml
from flexlora.report.run_folder import RunFolder

SEED = "seed"
NOT_SET = "–"


@dataclass(frozen=True)
class Arm:
    """Runs with the same settings but for the seed; ``runs`` maps seed to run."""

    name: str
    runs: Mapping[int, str]


def settings_of(run: RunFolder) -> dict[str, str]:
    """Return dotted key -> value as text; nothing for a configuration that is missing or damaged."""
    try:
        tree = read_yaml(run.config or "", run.path)
    except ForeignError:
        return {}
    return dict(_flat(tree, ())) if isinstance(tree, dict) else {}


def differing_settings(runs: Mapping[str, RunFolder]) -> list[tuple[str, list[str]]]:
    """Return the settings in which runs differ, the seed left out, with the value of each run in order."""
    settings = [settings_of(run) for run in runs.values()]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [(key, [one.get(key, NOT_SET) for one in settings]) for key in sorted(keys) if key != SEED]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def arms_of(runs: Mapping[str, RunFolder]) -> list[Arm]:
    """Return the arms of a comparison in the order of their first runs; a run with a seed that its arm has is one more.

    A run without a readable configuration is an arm of its own.
    """
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name, run in runs.items():
        settings = settings_of(run)
        seed = int(settings.get(SEED, "0")) if settings.get(SEED, "0").isdigit() else 0
        key = json.dumps({k: v for k, v in settings.items() if k != SEED}) if settings else name
        copy = next(number for number in range(len(runs)) if seed not in groups.get((key, number), {}))
        groups.setdefault((key, copy), {})[seed] = name
    members = [list(group.values()) for group in groups.values()]
    names = _arm_names(members)
    return [Arm(name, group) for name, group in zip(names, groups.values(), strict=True)]


def _arm_names(members: Sequence[Sequence[str]]) -> list[str]:
    """Return what the runs of an arm have in common at the start of their names; numbers where that is not enough."""
    common = [
        group[0] if len(group) == 1 else _common_start(group).removesuffix("seed").rstrip("-_. /") for group in members
    ]
    is_good = all(common) and len(set(common)) == len(common)
    return common if is_good else [f"{name or 'arm'} ({number})" for number, name in enumerate(common, start=1)]


def _common_start(names: Sequence[str]) -> str:
    """Return the letters that all names begin with."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike)


def _flat(tree: Mapping[Any, Any], path: tuple[str, ...]) -> list[tuple[str, str]]:
    found = []
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict) and value:
            found += _flat(value, here)
        else:
            found.append((".".join(here), "null" if value is None else str(value)))
    return found
