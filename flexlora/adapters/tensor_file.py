"""Writes a safetensors file one tensor at a time, so that its tensors are never in memory together."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class TensorSpool:
    """Tensors on their way into one file.

    They wait in a file without a name, which disappears with the process however it ends.

    Args:
        folder: Where the file without a name is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._entries: list[_Entry] = []
        self._size = 0

    def __enter__(self) -> "TensorSpool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor of a type in ``DTYPE_NAMES`` and at least one dimension; it is not kept in memory."""
        content = tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
        self._file.seek(self._size)
        self._file.write(content.data)
        self._entries.append(_Entry(name, tensor.dtype, tuple(tensor.shape), self._size, content.nbytes))
        self._size += content.nbytes

    def write(self, path: Path) -> None:
        """Write everything taken so far to ``path``, byte for byte as ``safetensors.torch.save_file`` does."""
        # Wide types first keeps every tensor aligned to its own width.
        entries = sorted(self._entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in entries:
            start, end = end, end + entry.size
            header[entry.name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": (start, end),
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for entry in entries:
                self._copy(entry, file)

    def _copy(self, entry: _Entry, file: BinaryIO) -> None:
        self._file.seek(entry.start)
        remaining = entry.size
        while remaining:
            chunk = self._file.read(min(_CHUNK_BYTES, remaining))
            file.write(chunk)
            remaining -= len(chunk)
