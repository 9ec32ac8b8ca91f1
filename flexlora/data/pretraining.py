"""Names the base model in the package and recognises what it was pretrained on, so that no experiment uses it.

The package carries one 64-bit hash per Natural Instructions instance of the pretrain-only tasks. A task is recognised
by its text, whatever its file is called.
"""

import os
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np

BASE_FOLDER = Path(__file__).parents[1] / "models" / "base"
EMBEDDED_BASE = "flexlora/embedded-llama-1m"
"""Public name of the base model in the package; adapters and cards call it so on every machine."""


INSTANCES_FILE = "pretraining_instances.npy"
TASKS_FILE = "pretraining_tasks.json"


def is_embedded_base(name_or_path: str) -> bool:
    """Return whether a name or path means the base model in the package."""
    is_named = name_or_path in ("embedded", EMBEDDED_BASE)
    return is_named or Path(name_or_path).expanduser().resolve() == BASE_FOLDER


def resolve_base_model(name_or_path: str) -> str:
    """Return what transformers loads a base model from: a folder or a hub id.

    ``embedded`` and ``flexlora/embedded-llama-1m`` are the small model in the package, which is on no hub.
    """
    return str(BASE_FOLDER) if is_embedded_base(name_or_path) else os.path.expanduser(name_or_path)


def instance_hash(definition: str, input: str) -> int:
    """Return 64 bits that identify an instance; white space at either end of the two texts does not count."""
    digest = blake2b(f"{definition.strip()}\0{input.strip()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@lru_cache(maxsize=1)
def _seen_hashes() -> frozenset[int]:
    return frozenset(np.load(BASE_FOLDER / INSTANCES_FILE, allow_pickle=False).tolist())


def seen_in_pretraining(definition: str, inputs: Iterable[str]) -> bool:
    """Return whether the embedded base has seen any of these inputs under this definition.

    Stops at the first input that was seen; a task that was not costs one hash per input.
    """
    seen = _seen_hashes()
    return any(instance_hash(definition, text) in seen for text in inputs)
