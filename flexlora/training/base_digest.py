"""Identifies the weights of a base model by what is stored, however it is cut into files or loaded."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from flexlora.adapters.base_names import is_gguf
from flexlora.data.pretraining import resolve_base_model
from flexlora.foreign import read_json
from flexlora.hub_reach import hub_is_reached
from flexlora.training.gguf_base import unpacked
from flexlora.training.linear_modules import ModelError

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PIECE_BYTES = 1 << 26


def base_digest(name_or_path: str, dtype: str = "float32", revision: str | None = None) -> str:
    """Return the SHA-256 over name, type, shape and bytes of every stored tensor of a base model, in order of names.

    The type in which it is loaded and how it is quantised do not matter, and neither does its tokenizer. A model of the
    hub must have been loaded before.

    Args:
        name_or_path: As for ``load_base_model``.
        dtype: In which a GGUF file was unpacked; of no other model does it matter.
        revision: Branch, tag or commit on the hub.

    Raises:
        ModelError: If there are no weights in safetensors files.
    """
    digests: dict[str, str] = {}
    for file in _weight_files(name_or_path, dtype, revision):
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():
                digests[name] = _tensor_digest(opened.get_tensor(name))
    whole = hashlib.sha256()
    for name, digest in sorted(digests.items()):
        whole.update(f"{name} {digest}\n".encode())
    return whole.hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    for piece in content.split(_PIECE_BYTES) if content.numel() else ():
        digest.update(piece.numpy().data)
    return digest.hexdigest()


def _weight_files(name_or_path: str, dtype: str, revision: str | None) -> list[Path]:
    """Return the safetensors files of a model, sorted."""
    if is_gguf(name_or_path):
        return sorted(unpacked(name_or_path, dtype, revision, hub_is_reached()).glob("*.safetensors"))
    name = resolve_base_model(name_or_path)
    folder = Path(name)
    if folder.is_dir():
        named = list(_named(folder / _WEIGHTS, folder / _INDEX))
        files = [folder / one for one in named] or sorted(folder.glob("*.safetensors"))
    else:
        files = [
            _cached(name, one, revision)
            for one in _named(*(_cached(name, one, revision) for one in (_WEIGHTS, _INDEX)))
        ]
    if not files or not all(file.is_file() for file in files):
        raise ModelError(f"the weights of a base model must be in safetensors files; {name_or_path} has none here")
    return sorted(files)


def _named(weights: Path, index: Path) -> Iterator[str]:
    """Yield the names of the files that hold the weights: one, or those that an index lists."""
    if weights.is_file():
        yield _WEIGHTS
    elif index.is_file():
        listed = read_json(index.read_bytes(), index)
        names = listed.get("weight_map") if isinstance(listed, dict) else None
        files = set(names.values()) if isinstance(names, dict) else set()
        if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
            raise ModelError(f"{index} must map weights to files beside it; put a copy of it back")
        yield from sorted(files)


def _cached(name: str, file: str, revision: str | None) -> Path:
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else Path(file + ".missing")
