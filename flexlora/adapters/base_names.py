"""Names a base model so that the name means the same on every machine."""

import re
from pathlib import Path

_CACHED = re.compile(r"(?:^|[/\\])models--(?P<id>[\w.-]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$")


def is_path(name: str) -> bool:
    """Return whether a name of a base model is a folder of some machine, not an id on the hub."""
    path = Path(name).expanduser()
    return path.is_absolute() or path.is_dir() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1


def is_gguf(name: str) -> bool:
    """Return whether a name of a base model means a GGUF file: a local one, or ``org/name/file.gguf`` on the hub."""
    return name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir()


def hub_file(name: str) -> tuple[str, str] | None:
    """Return the repository and the file in it that a GGUF file's name means on the hub, None for a local file.

    ``org/name/file.gguf`` is on the hub unless the folder ``org/name`` exists here.
    """
    parts, path = name.split("/"), Path(name).expanduser()
    if len(parts) < 3 or path.is_absolute() or parts[0] in (".", "..", "~") or path.parent.is_dir():
        return None
    return "/".join(parts[:2]), "/".join(parts[2:])


def without_cache(name: str) -> str:
    """Return the hub id of a folder in the Hugging Face cache, any other name as it is."""
    match = _CACHED.search(name)
    return match["id"].replace("--", "/", 1) if match else name


def portable_name(name: str) -> str:
    """Return the hub id of a base model where the name tells it, or else the last part of its path.

    A folder of the Hugging Face cache (``models--org--name/snapshots/...``) belongs to ``org/name``, and so does the
    GGUF file ``org/name/file.gguf``.
    """
    name = without_cache(name)
    if is_gguf(name) and (on_hub := hub_file(name)):
        return on_hub[0]
    if not is_path(name):
        return name
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return Path(name).expanduser().resolve().name if last in ("", ".", "..", "~") else last
