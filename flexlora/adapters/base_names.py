"""Names a base model so that the name means the same on every machine."""

import re
from pathlib import Path

_CACHED = re.compile(r"(?:^|[/\\])models--(?P<id>[\w.-]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")


def is_path(name: str) -> bool:
    """Return whether a name of a base model is a folder of some machine, not an id on the hub."""
    path = Path(name).expanduser()
    return path.is_absolute() or path.is_dir() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1


def without_cache(name: str) -> str:
    """Return the hub id of a folder in the Hugging Face cache, any other name as it is."""
    match = _CACHED.search(name)
    return match["id"].replace("--", "/", 1) if match else name


def portable_name(name: str) -> str:
    """Return the hub id of a base model where the name tells it, or else the last part of its path.

    A folder of the Hugging Face cache (``models--org--name/snapshots/...``) belongs to ``org/name``.
    """
    name = without_cache(name)
    if not is_path(name):
        return name
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return Path(name).expanduser().resolve().name if last in ("", ".", "..", "~") else last
