"""Describes what a folder of a file-based round holds: its run and round, and the hash of every file.

A folder is a standard PEFT adapter with a manifest beside it. Folders come from other organisations by whatever way
there is, so nothing in one is believed before it has been compared with the manifest, and the manifest with what the
reader knows itself. Names of files are chosen from a short list: no path in a manifest leads anywhere else.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.adapters.card import CARD_FILE
from flexlora.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from flexlora.engines.flower.run_settings import RunSettings
from flexlora.errors import FlexLoraError
from flexlora.files import sync
from flexlora.foreign import read_json

MANIFEST_FILE = "round.json"
SIGNATURE_FILE = "round.sig"
FROZEN_FOLDER = "frozen"
"""Folder in a broadcast with the branch that is added and not trained, an adapter of its own."""

MOST_SMALL_BYTES = 10_000_000
"""Of every file but weights."""
MOST_ENTRIES = 50
"""Entries of a folder that are looked at before it is refused."""

MOST_LOSS = 1e6
"""Nats per token; the mean over a cohort of larger ones could overflow."""

_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
ALLOWED_FILES = frozenset((*_FILES, *(f"{FROZEN_FOLDER}/{name}" for name in _FILES)))

ManifestT = TypeVar("ManifestT", bound="Manifest")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExchangeError(FlexLoraError, ValueError):
    """A folder of a file-based round that cannot be used, or is not the one that is meant."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileFacts(_Part):
    """What a file must be."""

    sha256: Sha256
    num_bytes: int = Field(ge=0)


class Manifest(_Part):
    """What every folder says of itself; ``base_sha256`` is the ``base_digest`` of the model that it adapts."""

    format_version: Literal[1] = 1
    run_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    server_round: int = Field(ge=1)
    base_sha256: Sha256
    config_sha256: Sha256
    plan: str
    rank: int = Field(ge=1)
    scalings: dict[str, dict[str, float]]
    files: dict[str, FileFacts]


class BroadcastManifest(Manifest):
    """What a server says of what it sends to the clients of one rank plan."""

    kind: Literal["broadcast"] = "broadcast"
    train_factors: Literal["both", "A", "B"] = "both"
    known_A: int | Literal["identity"] | None = None
    learning_rate: float = Field(gt=0)
    run: RunSettings


class ReplyManifest(Manifest):
    """What a client says of what it returns; ``started_from`` is the SHA-256 of the manifest it was sent."""

    kind: Literal["reply"] = "reply"
    client: str
    num_examples: int = Field(ge=1, le=10**12)
    started_from: Sha256
    loss: float | None = Field(default=None, ge=0, le=MOST_LOSS)
    steps: int | None = Field(default=None, ge=0)


def manifest_text(manifest: Manifest) -> str:
    """Return a manifest as it is written; equal ones give equal bytes."""
    return manifest.model_dump_json(indent=1) + "\n"


def read_manifest_file(folder: Path, kind: type[ManifestT]) -> tuple[ManifestT, bytes]:
    """Return the manifest of a folder and its bytes, having compared nothing else yet.

    Raises:
        ExchangeError: If there is none, or it is none of this kind.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir() or not os.path.lexists(path):
        raise ExchangeError(f"{folder} must be a folder with a {MANIFEST_FILE}; it is {_what(folder)}")
    content = read_regular(path, MOST_SMALL_BYTES)
    tree = read_json(content, path, unique_keys=True)
    found = tree.get("kind") if isinstance(tree, dict) else None
    wanted = kind.model_fields["kind"].default
    if found != wanted:
        raise ExchangeError(f"{path} must be that of a {wanted}; it says {found!r:.40}")
    try:
        return kind.model_validate_json(content), content
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ExchangeError(f"{path}: {where}: {problem['msg']}; it is damaged or of another version") from error


def facts_of(folder: Path) -> dict[str, FileFacts]:
    """Return the facts of every file of a folder that a manifest lists."""
    return {
        name: FileFacts(sha256=_digest(path, None), num_bytes=path.stat().st_size)
        for name, path in sorted(_listed(folder))
    }


def check_files(folder: Path, files: Mapping[str, FileFacts], most_bytes: int | None = None) -> None:
    """Raise unless a folder holds exactly these files, whole and unchanged, and nothing that leads out of it.

    Args:
        files: Path in the folder -> what the file must be.
        most_bytes: Of a file of weights; None sets no bound.

    Raises:
        ExchangeError: Naming the file, the rule and what was found.
    """
    for name, facts in files.items():
        if name not in ALLOWED_FILES:
            raise ExchangeError(f"{folder}: a manifest may list {', '.join(sorted(ALLOWED_FILES))}; it lists {name!r}")
        most = most_bytes if name.endswith(WEIGHTS_FILE) else MOST_SMALL_BYTES
        if most is not None and facts.num_bytes > most:
            raise ExchangeError(
                f"{folder}: {name} must have at most {most:,} bytes; it is said to have {facts.num_bytes:,}"
            )
    found = dict(_listed(folder))
    if missing := sorted(files.keys() - found.keys()):
        raise ExchangeError(f"{folder}: {missing[0]} must be there, as the manifest says; it is missing")
    if surplus := sorted(found.keys() - files.keys()):
        raise ExchangeError(f"{folder}: {surplus[0]!r} must not be there, the manifest does not list it; remove it")
    for name, facts in files.items():
        size = os.lstat(found[name]).st_size
        if size != facts.num_bytes:
            raise ExchangeError(f"{folder}: {name} must have {facts.num_bytes:,} bytes; it has {size:,}: send it again")
        if _digest(found[name], facts.num_bytes) != facts.sha256:
            raise ExchangeError(f"{folder}: {name} must have the SHA-256 of the manifest; it was changed on its way")


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Return the content of a plain file.

    Raises:
        ExchangeError: If it is a link or anything else, or larger.
    """
    with os.fdopen(_opened(path), "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ExchangeError(f"{path} must have at most {most_bytes:,} bytes; it has more")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a file into a folder that is still being made."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def _listed(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every file that a manifest has to list; hidden ones are nobody's.

    Raises:
        ExchangeError: If there is a link, a device, another folder, or too much.
    """
    num_entries = 0
    for place, prefix in ((folder, ""), (folder / FROZEN_FOLDER, f"{FROZEN_FOLDER}/")):
        if not os.path.lexists(place):
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                num_entries += 1
                if num_entries > MOST_ENTRIES:
                    raise ExchangeError(f"{folder} must hold an adapter and its manifest; it holds much more")
                name = f"{prefix}{entry.name}"
                if name in (MANIFEST_FILE, SIGNATURE_FILE) or entry.name.startswith("."):
                    continue
                if name == FROZEN_FOLDER and entry.is_dir(follow_symlinks=False):
                    continue
                if not entry.is_file(follow_symlinks=False):
                    raise ExchangeError(f"{folder}: {name!r} must be a plain file; it is a link or a folder")
                yield name, Path(entry.path)


def _opened(path: Path) -> int:
    """Return a descriptor of a plain file that is no link."""
    try:
        # A named pipe would make open() wait for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise ExchangeError(f"{path} must be a plain file that can be read; {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ExchangeError(f"{path} must be a plain file; it is something else")
    return descriptor


def _digest(path: Path, num_bytes: int | None) -> str:
    """Return the SHA-256 of a file, of which no more than ``num_bytes`` are read."""
    digest, left = hashlib.sha256(), num_bytes
    with os.fdopen(_opened(path), "rb") as file:
        while part := file.read(1 << 20 if left is None else min(1 << 20, left + 1)):
            digest.update(part)
            left = None if left is None else max(0, left - len(part))
    return digest.hexdigest()


def _what(folder: Path) -> str:
    if not os.path.lexists(folder):
        return "not there"
    return "a folder without one" if folder.is_dir() else "a file"
