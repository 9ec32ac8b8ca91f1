"""Packs named tensors and text into one safetensors blob and back.

The one metadata entry is JSON with the scalings (written so that they read back exactly), fields of the message and a
checksum over everything, because safetensors itself notices a cut blob but not a flipped bit. Equal content gives equal
bytes.
"""

import json
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flexlora.errors import FlexLoraError

_METADATA_KEY = "flexlora"
_VERSION = 1
_LARGEST = sys.float_info.max


class WireError(FlexLoraError, ValueError):
    """Bytes that are not what ``encode`` wrote."""


@dataclass(frozen=True)
class Blob:
    """What a message is made of.

    Attributes:
        tensors: On the CPU, contiguous, in the types that travel.
        scalings: Branch -> module -> scaling.
        fields: Plain JSON values.
    """

    tensors: Mapping[str, Tensor]
    scalings: Mapping[str, Mapping[str, float]]
    fields: Mapping[str, Any]


def pack(blob: Blob) -> bytes:
    """Return a blob as bytes; their number depends on names, shapes, types, scalings and fields, not on values."""
    content: dict[str, object] = {
        "version": _VERSION,
        "scalings": {branch: dict(sorted(of_modules.items())) for branch, of_modules in sorted(blob.scalings.items())},
        "fields": dict(sorted(blob.fields.items())),
    }
    content["checksum"] = _checksum(content, blob.tensors)
    # One entry only: safetensors writes several metadata entries in an order that changes from run to run.
    return safetensors.torch.save(dict(blob.tensors), {_METADATA_KEY: json.dumps(content, sort_keys=True)})


def unpack(data: bytes) -> Blob:
    """Return the blob that ``pack`` wrote.

    Raises:
        WireError: If ``data`` was cut off, altered or written by something else.
    """
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        content = json.loads(header["__metadata__"][_METADATA_KEY])
        checksum = content.pop("checksum")
        intact = content["version"] == _VERSION and checksum == _checksum(content, tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WireError(
            f"the payload of {len(data)} bytes cannot be read; it was cut off, altered or not written by flexlora "
            f"({type(error).__name__}: {error})"
        ) from error
    if not intact:
        raise WireError(
            f"the payload of {len(data)} bytes does not match its checksum or version; it was altered on the way or "
            "written by another version of flexlora"
        )
    scalings, fields = content.get("scalings"), content.get("fields")
    if not (_is_of_mappings(scalings) and isinstance(fields, dict)):
        raise WireError(
            f"the payload of {len(data)} bytes must have scalings, a finite number for each module, and fields; it was "
            "not written by flexlora"
        )
    return Blob(tensors, scalings, cast("dict[str, Any]", fields))


def _is_of_mappings(scalings: Any) -> bool:
    """Return whether what a stranger may have written is branch -> module -> finite number."""
    if not isinstance(scalings, dict):
        return False
    branches = cast("dict[str, Any]", scalings).values()
    return all(isinstance(one, dict) and all(map(_is_finite, cast("dict[str, Any]", one).values())) for one in branches)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _checksum(content: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of the metadata and of name, dtype, shape and bytes of every tensor."""
    checksum = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), checksum)
    # Of fixed width, so that the size of a message depends on its shapes alone.
    return f"{checksum:08x}"
