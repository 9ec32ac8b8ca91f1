"""Saves the server's state after a round and reads it back to the same bits, so that a run survives being killed.

One checkpoint is one folder ``round-NNNN`` with ``state.safetensors`` (every tensor) and ``state.json`` (everything
else, the digest of the tensors, and a digest of itself). The folder appears under its name only when both files are on
disk.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast, KeptFactors, SparseMask, TailPenalty
from flexlora.files import appearing_whole, write_whole
from flexlora.foreign import read_json
from flexlora.lora.factors import LoraFactors
from flexlora.seal import sealed, unsealed
from flexlora.text import printable

log = logging.getLogger(__name__)


FORMAT_VERSION = 2


UNSEALED_VERSION = 1
"""The format before, which is still read: its ``state.json`` has no digest of itself."""


MOST_LOOKS = 5
"""Times that a folder is read again because a live run replaced what was being read."""


TENSORS_FILE = "state.safetensors"


TREE_FILE = "state.json"


SENT_TYPES = {kind.__name__: kind for kind in (Broadcast, LoraFactors, SparseMask, TailPenalty)}


class CheckpointError(FlexLoraError, ValueError):
    """A checkpoint cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        server_round: The round that had just ended; 0 before the first.
        state: The aggregator's state.
        progress: What else the loop must remember, as plain JSON values.
        sent: What clients that are still training were sent, by a name that the loop chose.
        kept: Client id -> the factor that it keeps between rounds.
    """

    server_round: int
    state: Any
    progress: Mapping[str, Any]
    sent: Mapping[str, Broadcast] = field(default_factory=dict)
    kept: Mapping[str, KeptFactors] = field(default_factory=dict)


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, best_round: int | None = None) -> None:
    """Write ``folder/round-NNNN`` atomically, then drop the others as ``drop_checkpoints`` does.

    Checkpoints of later rounds are dropped too: the run has gone back behind them because they are damaged.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(checkpoint.state, tensors, "state")
    others = {"sent": _encode(checkpoint.sent, tensors, "sent")}
    if checkpoint.kept:
        others["kept"] = _encode(checkpoint.kept, tensors, "kept")
    for leftover in folder.glob(".round-*"):
        shutil.rmtree(leftover)
    with appearing_whole(_folder_of(folder, checkpoint.server_round)) as partial:
        description = {
            "format_version": FORMAT_VERSION,
            "server_round": checkpoint.server_round,
            "sha256": _write_tensors(partial / TENSORS_FILE, tensors),
            "progress": dict(checkpoint.progress),
            "state": tree,
            **others,
        }
        (partial / TREE_FILE).write_text(sealed(json.dumps(description)), encoding="utf-8")
    for later in _folders(folder):
        if _round_of(later) > checkpoint.server_round:
            shutil.rmtree(later)
    drop_checkpoints(folder, keep, best_round)


def drop_checkpoints(folder: Path, keep: int, best_round: int | None = None) -> None:
    """Drop all checkpoints but the newest ``keep`` and that of ``best_round``."""
    for old in _folders(folder)[keep:]:
        if best_round is None or old != _folder_of(folder, best_round):
            shutil.rmtree(old)


def replace_progress(folder: Path, server_round: int, progress: Mapping[str, Any]) -> None:
    """Replace the progress in the checkpoint of ``server_round``, atomically; its state stays.

    Raises:
        CheckpointError: If that checkpoint is damaged.
    """
    place = _folder_of(folder, server_round)
    description = {**_description(place), "format_version": FORMAT_VERSION, "progress": dict(progress)}
    write_whole(place / TREE_FILE, sealed(json.dumps(description)))


def load_latest(
    folder: Path,
    types: tuple[type, ...],
    check: Callable[[Checkpoint], object] = lambda checkpoint: None,
    recent: int | None = None,
) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None when there is none.

    A damaged checkpoint is skipped, with a warning in the log, and the one before it is read. A run may be writing to
    the folder meanwhile.

    Args:
        folder: The ``checkpoints`` folder of a run.
        types: The dataclasses that states may be made of.
        check: Raises for a checkpoint that is whole but cannot be used; then the one before it is read.
        recent: How many of the newest such a checkpoint can be passed over for; None for all. That of the best round
            may be many rounds old, and going back so far for the sake of a record would cost more than it saves.

    Raises:
        CheckpointError: Checkpoints exist but none can be read.
    """
    return _load(lambda: _folders(folder), types, check, recent)


def load_round(folder: Path, server_round: int, types: tuple[type, ...]) -> Checkpoint | None:
    """Return the checkpoint of a round, or None when there is none; arguments and errors as for ``load_latest``."""
    path = _folder_of(folder, server_round)
    return _load(lambda: [path] if path.is_dir() else [], types)


def _load(
    folders: Callable[[], Sequence[Path]],
    types: tuple[type, ...],
    check: Callable[[Checkpoint], object] = lambda checkpoint: None,
    recent: int | None = None,
) -> Checkpoint | None:
    known = {kind.__name__: kind for kind in types}
    problems: list[str] = []
    for _ in range(MOST_LOOKS):
        candidates, problems, refused = folders(), [], False
        for index, candidate in enumerate(candidates):
            if refused and recent is not None and index >= recent:
                break
            try:
                found = _read(candidate, known)
                refused = True
                check(found)
                return found
            except MemoryError:
                raise
            except Exception as error:  # What damage does to bytes cannot be listed.
                told = error if isinstance(error, FlexLoraError) else f"{type(error).__name__}: {error}"
                problems.append(f"{candidate}: {told}")
                if candidate.exists():
                    log.warning("checkpoint skipped: %s", printable(problems[-1]))
        if folders() == candidates:
            break
    else:
        problems.append("it was replaced again and again while it was read")
    if problems:
        raise CheckpointError(
            "no checkpoint can be read; put a copy of the folder back, or start anew with --overwrite. "
            + "; ".join(problems)
        )
    return None


def held_progress(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the progress in every checkpoint whose description is whole, newest first."""
    for place in _folders(folder):
        try:
            yield _description(place)["progress"]
        except (OSError, KeyError, ValueError):
            continue


def _read(folder: Path, types: Mapping[str, type]) -> Checkpoint:
    description = _description(folder)
    content = (folder / TENSORS_FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise CheckpointError(f"{TENSORS_FILE} does not have the digest that {TREE_FILE} names; the file is damaged")
    tensors = load(content)
    state = _decode(description["state"], tensors, types)
    # Checkpoints of earlier versions have none.
    sent = _decode(description.get("sent", {"items": {}}), tensors, SENT_TYPES)
    kept = _decode(description.get("kept", {"items": {}}), tensors, {})
    return Checkpoint(description["server_round"], state, description["progress"], sent, kept)


def _description(folder: Path) -> dict[str, Any]:
    """Return what the JSON file of a checkpoint says, without its digest.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = folder / TREE_FILE
    body, is_sealed = unsealed(path.read_bytes())
    description = read_json(body, TREE_FILE)
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != (FORMAT_VERSION if is_sealed else UNSEALED_VERSION):
        raise CheckpointError(
            f"{TREE_FILE} says format {version!r:.20} and has {'a' if is_sealed else 'no'} digest of itself; read are "
            f"{FORMAT_VERSION} with one and {UNSEALED_VERSION} without; the file is damaged, or of a later version"
        )
    if description.get("server_round") != _round_of(folder):
        raise CheckpointError(f"{TREE_FILE} is that of round {description.get('server_round')!r:.20}; was it copied?")
    return description


def _folder_of(folder: Path, server_round: int) -> Path:
    return folder / f"round-{server_round:04d}"


def _folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    found = [path for path in folder.glob("round-*") if path.is_dir() and path.name.removeprefix("round-").isdecimal()]
    return sorted(found, key=_round_of, reverse=True)


def _round_of(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _encode(getattr(value, field.name), tensors, f"{name}/{field.name}")
            for field in dataclasses.fields(value)
        }
        return {"type": type(value).__name__, "fields": fields}
    if isinstance(value, Mapping):
        return {"items": {key: _encode(item, tensors, f"{name}/{key}") for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"list": [_encode(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise CheckpointError(f"{name}: a state may not hold a {type(value).__name__}; see flexlora.aggregators.base")


def _decode(tree: Mapping[str, Any], tensors: Mapping[str, Tensor], types: Mapping[str, type]) -> Any:
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "type" in tree:
        fields = {name: _decode(item, tensors, types) for name, item in tree["fields"].items()}
        return types[tree["type"]](**fields)
    if "items" in tree:
        return {key: _decode(item, tensors, types) for key, item in tree["items"].items()}
    if "list" in tree:
        return tuple(_decode(item, tensors, types) for item in tree["list"])
    return tree["value"]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the tensors without copying them and return the SHA-256 of the file."""
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; all others need no copy.
        apart[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    try:
        save_file(apart, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
