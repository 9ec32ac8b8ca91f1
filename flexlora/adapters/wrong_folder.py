"""Says what a folder or file that is no adapter is instead, where it can be recognised, and what to do."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from flexlora.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE

MOST_FOLDERS = 1000
"""Folders that are looked into for adapters."""


MOST_NAMED = 5


_DEPTH = 3


_URL = re.compile(
    r"https?://(?:www\.)?huggingface\.co/(?P<id>[^/\s]+/[^/\s?#]+)(?:/(?:tree|blob)/(?P<revision>[^/\s?#]+))?"
)


_POINTER = b"version https://git-lfs.github.com/spec/"


def what_it_is(folder: Path, name: str) -> str:
    """Return the end of a message about a folder called ``name`` that is no adapter; empty where nothing is known."""
    if match := _URL.match(name):
        revision = f"@{match['revision']}" if match["revision"] else ""
        return f"; that is an address, give the hub id: {match['id']}{revision}"
    if folder.is_file():
        is_part = folder.name in (CONFIG_FILE, WEIGHTS_FILE)
        return f"; that is a file, give the folder{f': {folder.parent}' if is_part else ''}"
    if not folder.is_dir():
        return "; there is no such folder"
    if inside := sorted(islice(_adapters_below(folder), MOST_NAMED + 1)):
        named = ", ".join(str(path) for path in inside[:MOST_NAMED])
        more = ", ..." if len(inside) > MOST_NAMED else ""
        return f"; it holds adapters in folders below, give one or several of these: {named}{more}"
    if (folder / "config.yaml").is_file() and (folder / "records.jsonl").is_file():
        return f"; it is the folder of a run without adapters: flexlora export {folder} --out DIR writes one"
    names = {path.name for path in islice(folder.iterdir(), MOST_FOLDERS)}
    if CONFIG_FILE in names:
        return f"; {WEIGHTS_FILE} is missing, was it copied or downloaded whole?"
    if WEIGHTS_FILE in names:
        return f"; {CONFIG_FILE} is missing, take it from where the adapter was trained"
    if "config.json" in names:
        return "; it is a whole model: a LoRA adapter must be extracted first, as mergekit-extract-lora does"
    if any(other.endswith(("lora_weights.safetensors", ".gguf")) for other in names):
        return "; it holds LoRA in another format than PEFT's: convert it, or take the adapter it was made from"
    return ""


def _adapters_below(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Yield the adapter folders below ``folder``."""
    for path in islice(sorted(folder.iterdir()), MOST_FOLDERS):
        if path.is_dir() and not path.is_symlink():
            if (path / CONFIG_FILE).is_file():
                yield path
            elif depth > 1:
                yield from _adapters_below(path, depth - 1)


def wrong_content(path: Path) -> str:
    """Return what a file holds instead of what its name says, or an empty text where nothing is known."""
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        return "is empty: copy or download it again"
    if start.startswith(_POINTER):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull` in the repository"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not the file itself: download it again, logged in if the repository asks for it"
    if start.startswith(b"PK\x03\x04"):
        return "is a zip archive or a pickle of torch.save: save the adapter with PEFT's save_pretrained"
    return ""
