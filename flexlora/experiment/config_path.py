"""Reads the file of a configuration, or says what the path leads to instead."""

import os
import shlex
from pathlib import Path

from flexlora.experiment.config import ConfigError
from flexlora.foreign import MOST_YAML_BYTES
from flexlora.report.run_folder import CONFIG_FILE
from flexlora.rounds.records import MANIFEST_FILE, RECORDS_FILE

DEMO = "demo"
"""Name of the configuration that comes with the package."""


def content_of(path: Path) -> bytes:
    """Return what is in a file, a pipe or a device, cut behind the most that a configuration may have.

    Raises:
        ConfigError: If there is nothing of this name, or a folder.
    """
    if os.path.isdir(path):  # Unlike the methods of a path, it takes any name.
        raise ConfigError([_what_a_folder_is(path)], str(path))
    if not os.path.exists(path):
        raise ConfigError([f"there is no such file{_near_by(path)}"], str(path))
    with path.open("rb") as file:
        return file.read(MOST_YAML_BYTES + 1)


def _what_a_folder_is(folder: Path) -> str:
    """Return in words what to name instead of a folder."""
    inside = folder / CONFIG_FILE
    if inside.is_file() and any((folder / name).exists() for name in (RECORDS_FILE, MANIFEST_FILE)):
        file, run = shlex.quote(str(inside)), shlex.quote(str(folder))
        return (
            f"it is the folder of a run, and a configuration is a file: name {file}; to continue that run: "
            f"flexlora run {file} --out {run} --resume"
        )
    if inside.is_file():
        return f"it is a folder, and a configuration is a file: name {shlex.quote(str(inside))}"
    files = _yaml_files(folder)
    return "it is a folder, and a configuration is a YAML file; " + (
        f"it holds {', '.join(files)}" if files else "it holds none"
    )


def _near_by(path: Path) -> str:
    parent = path.parent
    files = _yaml_files(parent) if os.path.isdir(parent) else []
    near = f"; {parent} holds {', '.join(files)}" if files else ""
    return near + ("" if path.suffix else f'; "{DEMO}" comes with flexlora')


def _yaml_files(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
