"""Shares a loaded model with other processes: its tensors in memory that all of them map, the rest as a pickle.

The memory is a file without a name, so nothing is left behind however a process ends. Pickles pass only from a process
to children that it has started itself.
"""

import io
import mmap
import os
import pickle
import tempfile
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import torch
from torch import Tensor, nn

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel


class SharingError(FlexLoraError, ValueError):
    """A model that cannot be shared with other processes."""


@dataclass(frozen=True)
class SharedModel:
    """A model that other processes can attach to.

    Attributes:
        memory: Holds its tensors.
        description: Everything else.
    """

    memory: IO[bytes]
    description: bytes


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in the shared memory, which begins at byte ``offset``."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    requires_grad: bool

    def map(self, file_descriptor: int) -> Tensor:
        """Return the tensor, mapped; writing to it changes this process's own copy of a page and no other's."""
        num_bytes = prod(self.shape) * self.dtype.itemsize
        if not num_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        pages = mmap.mmap(
            file_descriptor,
            num_bytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=self.offset,
        )
        return torch.frombuffer(pages, dtype=self.dtype).view(self.shape)


def share(model: AdaptedModel) -> SharedModel:
    """Return ``model`` for ``attach``, without adapters; a model on the CPU itself uses the shared memory from now on.

    Raises:
        SharingError: If a part of it cannot be pickled, or a tensor is not a plain one.
    """
    # Loaded factors belong to the caller and are not moved.
    model.load(Broadcast(trainable={}))
    on_cpu = model.device.type == "cpu"
    memory = _memory_file() if on_cpu else tempfile.TemporaryFile()
    description = io.BytesIO()
    try:
        _Pickler(description, memory, move=on_cpu).dump(model)
    except Exception as error:  # A model's own pickling code may raise anything.
        memory.close()
        if isinstance(error, SharingError):
            raise
        raise SharingError(
            f"a model must be picklable to be used by several processes; {type(error).__name__}: {error}"
        ) from error
    return SharedModel(memory, description.getvalue())


def attach(file_descriptor: int, description: bytes, device: str) -> AdaptedModel:
    """Return the model that another process shared, on ``device``; on a CPU, its tensors are in the shared memory."""
    return _Unpickler(io.BytesIO(description), file_descriptor, device).load()


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("flexlora-base"), "w+b")
    return tempfile.TemporaryFile()


class _Pickler(pickle.Pickler):
    """Pickles a model without its tensors, which it writes to the memory; with ``move``, the model then uses those."""

    def __init__(self, file: IO[bytes], memory: IO[bytes], *, move: bool) -> None:
        super().__init__(file, protocol=5)
        self._memory, self._move = memory, move
        # Holds a reference to each tensor, because an id may be used again once its object is gone.
        self._stored: dict[int, tuple[Tensor, int, _StoredTensor]] = {}

    def persistent_id(self, obj: Any) -> tuple[int, _StoredTensor] | None:
        """Return the number and description of a tensor; the same ones each time it is met, as tied weights are."""
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._stored:
            self._stored[id(obj)] = (obj, len(self._stored), self._write(obj))
        return self._stored[id(obj)][1:]

    def _write(self, tensor: Tensor) -> _StoredTensor:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise SharingError(
                f"tensors must be plain ones to be used by several processes; got {type(tensor).__name__}"
            )
        # Each tensor begins on a new page, so that it can be mapped on its own and moved as soon as it is written.
        offset = -(-self._memory.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._memory.seek(offset)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._memory.write(content.data)
        self._memory.flush()
        stored = _StoredTensor(
            offset, tuple(tensor.shape), tensor.dtype, isinstance(tensor, nn.Parameter), tensor.requires_grad
        )
        if self._move:
            tensor.data = stored.map(self._memory.fileno())
        return stored


class _Unpickler(pickle.Unpickler):
    """Reads what ``_Pickler`` wrote."""

    def __init__(self, file: IO[bytes], file_descriptor: int, device: str) -> None:
        super().__init__(file)
        self._file_descriptor, self._device = file_descriptor, device
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, pid: tuple[int, _StoredTensor]) -> Tensor:
        """Return the tensor with a number, mapped when it is met first."""
        number, stored = pid
        if number not in self._tensors:
            tensor = stored.map(self._file_descriptor).to(self._device)
            self._tensors[number] = (
                nn.Parameter(tensor, stored.requires_grad)
                if stored.is_parameter
                else tensor.requires_grad_(stored.requires_grad)
            )
        return self._tensors[number]
