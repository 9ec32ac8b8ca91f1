"""Completes what is typed in a shell: configurations, settings, methods and folders of runs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def configurations(incomplete: str) -> Iterator[str]:
    """Yield ``demo``, YAML files and the folders that may hold more."""
    if "demo".startswith(incomplete):
        yield "demo"
    yield from _paths(incomplete, lambda path: path.suffix in (".yaml", ".yml"))


def runs(incomplete: str) -> Iterator[str]:
    """Yield folders; that of a run without the slash that goes on into it."""
    for path in _paths(incomplete, lambda path: False):
        yield path.rstrip("/") if (Path(path) / "config.yaml").is_file() else path


def settings(incomplete: str) -> Iterator[str]:
    """Yield ``section.name=`` of every setting, or the values of one that has few."""
    key, separator, value = incomplete.partition("=")
    if not separator:
        from flexlora.experiment.setting_hints import setting_names

        yield from (f"{name}=" for name in sorted(setting_names()) if name.startswith(incomplete))
    elif key == "method.name":
        yield from (f"{key}={name}" for name in methods(value))


def methods(incomplete: str) -> Iterator[str]:
    """Yield the names of aggregation methods."""
    from flexlora.aggregators.registry import method_names

    yield from (name for name in method_names() if name.startswith(incomplete))


def _paths(incomplete: str, is_wanted: Callable[[Path], bool]) -> Iterator[str]:
    folder, start = os.path.split(incomplete)
    try:
        found = sorted(Path(folder or ".").iterdir())
    except OSError:
        return
    for path in found:
        if path.name.startswith(start) and (start or not path.name.startswith(".")):
            if path.is_dir():
                yield os.path.join(folder, path.name, "")
            elif is_wanted(path):
                yield os.path.join(folder, path.name)
