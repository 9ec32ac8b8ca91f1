"""Saves the server's state after a round and reads it back to the same bits, so that a run survives being killed.

One checkpoint is one folder ``round-NNNN`` with ``state.safetensors`` (every tensor) and ``state.json`` (everything
else, and the digest of the tensors). The folder appears under its name only when both files are on disk.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast, KeptFactors, SparseMask, TailPenalty
from flexlora.files import appearing_whole, write_whole
from flexlora.lora.factors import LoraFactors

log = logging.getLogger(__name__)


FORMAT_VERSION = 1


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


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write ``folder/round-NNNN`` atomically, then drop all but the newest ``keep`` checkpoints."""
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
        (partial / TREE_FILE).write_text(json.dumps(description), encoding="utf-8")
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)


def replace_progress(folder: Path, server_round: int, progress: Mapping[str, Any]) -> None:
    """Replace the progress in the checkpoint of ``server_round``, atomically; its state stays."""
    path = _folder_of(folder, server_round) / TREE_FILE
    description = {**json.loads(path.read_bytes()), "progress": dict(progress)}
    write_whole(path, json.dumps(description))


def load_latest(folder: Path, types: tuple[type, ...]) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None when there is none.

    A damaged checkpoint is skipped, with a warning in the log, and the one before it is read.

    Args:
        folder: The ``checkpoints`` folder of a run.
        types: The dataclasses that states may be made of.

    Raises:
        CheckpointError: Checkpoints exist but none can be read.
    """
    candidates = _folders(folder)
    problems = []
    for candidate in candidates:
        try:
            return _read(candidate, {kind.__name__: kind for kind in types})
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            problems.append(f"{candidate}: {error}")
            log.warning("checkpoint skipped: %s", problems[-1])
    if problems:
        raise CheckpointError("no checkpoint can be read; start anew with --overwrite. " + "; ".join(problems))
    return None


def _read(folder: Path, types: Mapping[str, type]) -> Checkpoint:
    description = json.loads((folder / TREE_FILE).read_bytes())
    if description["format_version"] != FORMAT_VERSION:
        raise CheckpointError(f"format {description['format_version']} is not {FORMAT_VERSION}, the one read here")
    content = (folder / TENSORS_FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise CheckpointError(f"{TENSORS_FILE} does not have the digest that {TREE_FILE} names; the file is damaged")
    tensors = load(content)
    state = _decode(description["state"], tensors, types)
    # Checkpoints of earlier versions have none.
    sent = _decode(description.get("sent", {"items": {}}), tensors, SENT_TYPES)
    kept = _decode(description.get("kept", {"items": {}}), tensors, {})
    return Checkpoint(description["server_round"], state, description["progress"], sent, kept)


def _folder_of(folder: Path, server_round: int) -> Path:
    return folder / f"round-{server_round:04d}"


def _folders(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    found = [path for path in folder.glob("round-*") if path.is_dir() and path.name.removeprefix("round-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")), reverse=True)


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
