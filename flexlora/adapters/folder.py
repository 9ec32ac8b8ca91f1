"""Opens and reads PEFT adapter folders whose factors mean what ``scaling * B @ A`` says.

Opening a folder reads its configuration and the header of its weights. Whatever would make the factors mean something
else is refused by name; what is left can be added up.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexlora.adapters.base_names import without_cache
from flexlora.adapters.peft_format import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, AdapterError
from flexlora.adapters.peft_settings import pickle_error, plain_targets, read_config
from flexlora.adapters.stored_modules import StoredCopy, StoredModule, read_header
from flexlora.adapters.wrong_folder import wrong_content
from flexlora.lora.factors import AdapterState, LoraFactors

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?")


@dataclass(frozen=True)
class AdapterFolder:
    """An opened adapter; nothing of its factors is in memory.

    Attributes:
        name: What the folder was called when it was asked for.
        base_model: Name or path of the base model, None where the adapter does not say.
        settings: ``auto_mapping``, ``fan_in_fan_out``, ``layer_replication``, ``revision`` of the base (None for its
            main one) and ``task_type``.
        target_modules: Names the modules were chosen by, None where they were chosen in a less simple way.
        modules: Module path -> its factors.
        copies: Module path -> the whole weights stored beside factors: untrained embeddings, saved for convenience.
        is_renamed: Whether paths were freed of what tools for training wrap around modules.
        weights: The open file.
    """

    name: str
    base_model: str | None
    settings: Mapping[str, Any]
    target_modules: tuple[str, ...] | None
    modules: Mapping[str, StoredModule]
    copies: Mapping[str, StoredCopy]
    is_renamed: bool
    weights: safe_open

    @property
    def base(self) -> str | None:
        """The base model with its revision where one is named."""
        revision = self.settings["revision"]
        return f"{self.base_model}@{revision}" if self.base_model and revision else self.base_model

    def factors(self, path: str) -> LoraFactors:
        """Return the factors of a module, mapped from the file.

        Raises:
            AdapterError: If one holds NaN or infinity.
        """
        module = self.modules[path]
        A, B = (self._finite(key) for key in module.keys)
        return LoraFactors(A, B, module.scaling)

    def whole_weights(self, path: str) -> list[Tensor]:
        """Return the whole weights of one of ``copies``, mapped from the file; two where it is stored twice.

        Raises:
            AdapterError: If one holds NaN or infinity.
        """
        return [self._finite(key) for key in self.copies[path].keys]

    def _finite(self, key: str) -> Tensor:
        tensor = self.weights.get_tensor(key)
        # Unlike isfinite() over every entry, the extremes need no memory; NaN is an extreme.
        if not all(isfinite(float(extreme)) for extreme in torch.aminmax(tensor)):
            raise AdapterError(f"{self.name}: {key} must be finite; it holds NaN or infinity")
        return tensor


def locate_adapter(name: str) -> Path:
    """Return the folder called ``name``, fetched from the Hugging Face hub if it is no local one but reads like an id.

    An id may name a branch, tag or commit: ``org/name@revision``.

    Raises:
        AdapterError: If the hub has no such adapter, or has it as a pickle only, or cannot be reached.
    """
    match = _HUB_ID.fullmatch(name)
    if Path(name).exists() or match is None:
        return Path(name)
    revision: str | None = match["revision"]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                match["id"], revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
            )
        )
        is_whole = (folder / WEIGHTS_FILE).is_file() and (folder / CONFIG_FILE).is_file()
        files = [] if is_whole else huggingface_hub.list_repo_files(match["id"], revision=revision)
    except Exception as error:  # the hub's errors have no base of their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdapterError(f"{name} is no local folder, and the hub did not give it ({reason})") from error
    if not is_whole:
        raise _hub_error(name, match["id"], files)
    return folder


def _hub_error(name: str, repo_id: str, files: Sequence[str]) -> AdapterError:
    """Return the error of a repository that has no adapter where PEFT looks for one."""
    if PICKLE_FILE in files and WEIGHTS_FILE not in files:
        return pickle_error(name)
    below = sorted(file.removesuffix(f"/{CONFIG_FILE}") for file in files if file.endswith(f"/{CONFIG_FILE}"))
    what = ""
    if below:
        what = (
            f"; it holds adapters in folders: {', '.join(below[:5])}{', ...' if len(below) > 5 else ''}: fetch one "
            f"(hf download {repo_id} --include '{below[0]}/*' --local-dir DIR) and give DIR/{below[0]}"
        )
    elif "config.json" in files:
        what = "; it is a whole model: a LoRA adapter must be extracted first, as mergekit-extract-lora does"
    return AdapterError(f"{name} must hold {CONFIG_FILE} and {WEIGHTS_FILE} on the hub{what}")


@contextmanager
def open_adapter(folder: Path | str, name: str | None = None) -> Iterator[AdapterFolder]:
    """Give a ``with`` block the adapter of a PEFT folder.

    An open adapter holds a mapping of its file and no file descriptor, so thousands may be open.

    Args:
        folder: Where it lies.
        name: What to call it in messages; the folder if None.

    Raises:
        AdapterError: If files are missing or broken, or the adapter is more than LoRA on linear modules and embeddings.
    """
    folder = Path(folder)
    name = name or str(folder)
    config = read_config(folder, name)
    # safetensors says of a file that must not be read that it is not there.
    (folder / WEIGHTS_FILE).open("rb").close()
    try:
        opened = safe_open(folder / WEIGHTS_FILE, framework="pt")
    except SafetensorError as error:
        wrong = wrong_content(folder / WEIGHTS_FILE) or f"is not a whole safetensors file ({error})"
        raise AdapterError(f"{name}: {WEIGHTS_FILE} {wrong}") from error
    with opened as weights:
        header = read_header(weights, config, name)
        yield AdapterFolder(
            name=name,
            base_model=without_cache(str(config.get("base_model_name_or_path") or "").rstrip("/")) or None,
            settings={
                "auto_mapping": config.get("auto_mapping") or None,
                "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
                "layer_replication": config.get("layer_replication") or None,
                "revision": None if config.get("revision") in ("", "main") else config.get("revision"),
                "task_type": config.get("task_type") or None,
            },
            target_modules=plain_targets(config),
            modules=header.modules,
            copies=header.copies,
            is_renamed=header.is_renamed,
            weights=weights,
        )


def read_adapter(folder: Path | str) -> AdapterState:
    """Return the adapter of a PEFT folder; its tensors are mapped from the file, not copied.

    Raises:
        AdapterError: If files are missing or broken, or the adapter is more than plain LoRA on linear modules.
    """
    with open_adapter(folder) as adapter:
        other = [*adapter.copies, *(path for path, module in adapter.modules.items() if module.is_embedding)]
        if other:
            raise AdapterError(f"{folder}: only LoRA factors of linear modules can be read; found {other[0]}")
        return {path: adapter.factors(path) for path in adapter.modules}
