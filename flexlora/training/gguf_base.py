"""Turns base models in GGUF files (llama.cpp, Ollama) into folders that load like any other, once for each file.

transformers reads the weights of many architectures from GGUF and unpacks their blocks; that takes seconds to minutes
and a copy for each process. Here it is done once: the folder, named after the file's SHA-256, holds safetensors, which
processes map, and the tokenizer with its chat template.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, modeling_gguf_pytorch_utils

from flexlora.adapters.base_names import hub_file
from flexlora.data.corpus_cache import user_cache_folder
from flexlora.errors import FlexLoraError
from flexlora.files import appearing_whole
from flexlora.foreign import read_json
from flexlora.seal import sealed, unsealed
from flexlora.training.linear_modules import ModelError
from flexlora.training.model_folder import check_sizes, check_tokenizer, check_weights

MAGIC = b"GGUF"
SIZES_FILE = "gguf_source.json"
"""Sizes of all files of a folder; written last."""

MOST_FOLDERS = 4
"""If there are more, those used longest ago are deleted."""

LAYOUT = 1
"""Goes up when folders are written in another way, so that those of before are not taken."""

_log = logging.getLogger(__name__)


def unpacked(name_or_path: str, dtype: str, revision: str | None = None, is_reached: bool = True) -> Path:
    """Return a folder in Hugging Face format with the model of a GGUF file, made now if there is none yet.

    Args:
        name_or_path: A local file, or ``org/name/file.gguf``: a file of a hub repository.
        dtype: Of the weights in the folder: ``float32`` holds exactly what the file means.
        revision: Branch, tag or commit on the hub.
        is_reached: Whether the hub can be asked; if not, only its cache is looked into.

    Raises:
        ModelError: If there is no such file, it holds no causal language model, or transformers cannot read it.
    """
    file = _local(name_or_path, revision, is_reached)
    _check_magic(file, name_or_path)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = user_cache_folder() / f"gguf-{LAYOUT}-{digest[:32]}-{dtype}"
    if not _is_whole(folder):
        _log.info("Unpacking %s into %s.", file, folder)
        unpack(file, folder, dtype, name_or_path)
        _delete_old(folder)
    return folder


def unpack(file: Path, folder: Path, dtype: str, name: str | None = None) -> None:
    """Write the model of a GGUF file and its tokenizer as transformers does, in place of what ``folder`` holds.

    Args:
        file: Any that begins as GGUF files do.
        folder: Appears when it is complete.
        dtype: Of the weights.
        name: What errors call the file.

    Raises:
        ModelError: If the file holds no causal language model, or transformers cannot read it.
    """
    name = name or str(file)
    _check_magic(file, name)
    _check_header(file, name)
    with appearing_whole(folder) as partial:
        _write(file, partial, dtype, name)


def _local(name_or_path: str, revision: str | None, is_reached: bool) -> Path:
    """Return the file on this machine, fetched from the hub where the name is one of there."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    on_hub = hub_file(name_or_path)
    if on_hub is None:
        raise ModelError(
            f"the base model must be a file that exists; there is no file {name_or_path}; one on the hub is called "
            "org/name/file.gguf"
        )
    try:
        return Path(hf_hub_download(*on_hub, revision=revision, local_files_only=not is_reached))
    except Exception as error:  # the hub's errors have no base of their own
        raise ModelError(
            f"there is no local file {name_or_path}, and the hub gives none of the repository {on_hub[0]}. "
            "Check the spelling, the network (HF_HUB_OFFLINE, the local cache), and HF_TOKEN if it is gated. Reason: "
            f"{' '.join(str(error).split())[:500]}"
        ) from error


def _check_magic(file: Path, name_or_path: str) -> None:
    with file.open("rb") as opened:
        begin = opened.read(64)
    if begin[:4] == MAGIC:
        return
    if begin.startswith(b"version https://git-lfs"):
        raise ModelError(f"{name_or_path} is the pointer of git-lfs to a GGUF file: fetch the file with `git lfs pull`")
    what = "is empty" if not begin else f"begins with {begin[:4]!r}"
    raise ModelError(f"{name_or_path} must begin with {MAGIC!r} as GGUF files do; it {what}: fetch the file again")


def _check_header(file: Path, name_or_path: str) -> None:
    """Raise if a file holds something else than one whole language model that transformers can read."""
    if find_spec("gguf") is None:
        raise ModelError(f"{name_or_path}: base models in GGUF files need pip install 'flexlora[gguf]'")
    facts = _header(file, name_or_path)
    kind, architecture = facts.get("general.type", "model"), facts.get("general.architecture")
    if kind == "adapter":
        raise ModelError(f"{name_or_path} holds an adapter; name the base model that it was made for")
    if kind != "model" or architecture == "clip":
        raise ModelError(
            f"{name_or_path} must hold a language model; it holds {architecture!r} of type {kind!r}, which is a part "
            "of one: name the file with the language model"
        )
    count = facts.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise ModelError(
            f"{name_or_path} is one of {count} parts of a model: put them together with llama.cpp's "
            "`llama-gguf-split --merge FIRST-PART WHOLE.gguf`, and name that file"
        )
    check_sizes({key: value for key, value in facts.items() if isinstance(value, int)}, name_or_path)


def _header(file: Path, name_or_path: str) -> dict[str, Any]:
    """Return the single values that a file says of itself."""
    import gguf

    try:
        fields: Mapping[str, Any] = gguf.GGUFReader(file).fields
        single = (gguf.GGUFValueType.ARRAY,)
        return {name: field.contents() for name, field in fields.items() if field.types[0] not in single}
    except Exception as error:  # What damaged files make the library raise cannot be listed.
        raise ModelError(
            f"{name_or_path} cannot be read as a GGUF file: it is cut short or damaged; fetch it again. Reason: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _write(file: Path, folder: Path, dtype: str, name_or_path: str) -> None:
    """Write model, tokenizer and their sizes into an empty folder."""
    source: dict[str, Any] = {"gguf_file": file.name}
    try:
        with _without_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, output_loading_info=True, **source, **_unpacking()
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
        model, info = loaded
        check_weights(model, info, name_or_path)
        check_tokenizer(tokenizer, name_or_path)
        _plain(model).to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (FlexLoraError, MemoryError):
        raise
    except Exception as error:  # What files of others make libraries raise cannot be listed.
        raise ModelError(
            f"{name_or_path} must hold a language model of an architecture and with blocks that transformers can read "
            "from GGUF files; name the model's folder or hub id in safetensors instead. Reason: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        ) from error
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / SIZES_FILE).write_text(sealed(json.dumps({"sizes": sizes})), encoding="utf-8")


@contextmanager
def _without_bar() -> Iterator[None]:
    """Keep transformers from drawing the one bar that its own switch does not turn off, across those of ours."""
    bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    if bar is None:
        yield
        return
    setattr(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **ignored: tensors)  # noqa: B010 (no name of its own)
    try:
        yield
    finally:
        setattr(modeling_gguf_pytorch_utils, "tqdm", bar)  # noqa: B010


def _unpacking() -> dict[str, Any]:
    """Return the argument that makes transformers leave no blocks in the model, of versions that could."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model as one that was never quantised; transformers refuses to save others."""
    config: Any = model.config
    if getattr(config, "quantization_config", None) is None:
        return model
    weights = model.state_dict()
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _is_whole(folder: Path) -> bool:
    """Return whether a folder has all files in their sizes, and mark it as used."""
    try:
        body, is_sealed = unsealed((folder / SIZES_FILE).read_bytes())
        sizes = read_json(body, SIZES_FILE)["sizes"]
        found = is_sealed and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
    if found:
        with suppress(OSError):
            os.utime(folder)
    return found


def _delete_old(newest: Path) -> None:
    """Delete the folders used longest ago where there are too many; a process that maps one keeps what it maps."""
    others = [path for path in newest.parent.glob("gguf-*") if path.is_dir() and path != newest]
    with suppress(OSError):
        for path in sorted(others, key=lambda path: -path.stat().st_mtime)[MOST_FOLDERS - 1 :]:
            shutil.rmtree(path, ignore_errors=True)
