"""Names the files and tensors of a PEFT adapter folder, and the error of one that cannot be used."""

import re

from flexlora.errors import FlexLoraError

CONFIG_FILE = "adapter_config.json"


WEIGHTS_FILE = "adapter_model.safetensors"


PICKLE_FILE = "adapter_model.bin"


PICTURE_ENDINGS = (".svg", ".png", ".pdf")
"""Endings of the picture files that can be written."""


INTO_THE_BASE = "merge it into its base model instead (merge_and_unload in PEFT)"
"""What to do with an adapter whose change is more than products of factors."""


_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


class AdapterError(FlexLoraError, ValueError):
    """An adapter that cannot be written, read or merged."""


class MergeError(AdapterError):
    """Adapters that cannot be combined as asked."""


def factor_keys(path: str, is_embedding: bool = False) -> tuple[str, str]:
    """Return the keys of ``A`` and ``B`` in a PEFT file."""
    if is_embedding:
        return f"base_model.model.{path}.lora_embedding_A", f"base_model.model.{path}.lora_embedding_B"
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"


def is_expert(path: str) -> bool:
    """Return whether a module is one of several experts, which some versions of transformers fuse."""
    return _EXPERT.search(path) is not None
