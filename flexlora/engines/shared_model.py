"""How a loaded model gets into other processes of this machine: its tensors in memory they all map, the rest pickled.

The memory is a file without a name, so that nothing is left behind however a process ends. Pickles pass only from a
process to children it has started itself.
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
    """A model that other processes cannot be given."""


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
class _Place:
    """Where a tensor is in the memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_parameter: bool
    requires_grad: bool

    def map(self, file_descriptor: int) -> Tensor:
        """Return the tensor; writing to it would change this process's copy of a page and no other's."""
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
    """Return ``model`` for ``attach``, as the bare base; one on the CPU uses the same memory itself from now on.

    Raises:
        SharingError: If some part of it cannot be pickled, or a tensor is of a special kind.
    """
    # Factors that were loaded are somebody else's tensors.
    model.load(Broadcast(trainable={}))
    on_cpu = model.device.type == "cpu"
    memory = _memory_file() if on_cpu else tempfile.TemporaryFile()
    description = io.BytesIO()
    try:
        _Pickler(description, memory, move=on_cpu).dump(model)
    except Exception as error:  # Whatever a model's own way of being pickled raises.
        memory.close()
        if isinstance(error, SharingError):
            raise
        raise SharingError(
            f"a model must be picklable to be used by several processes; {type(error).__name__}: {error}"
        ) from error
    return SharedModel(memory, description.getvalue())


def attach(file_descriptor: int, description: bytes, device: str) -> AdaptedModel:
    """Return the model that another process shared, on ``device``; on a CPU its tensors are that process's memory."""
    return _Unpickler(io.BytesIO(description), file_descriptor, device).load()


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("flexlora-base"), "w+b")
    return tempfile.TemporaryFile()


class _Pickler(pickle.Pickler):
    """Pickles a model without its tensors, which it writes to the memory; with ``move``, they then live there."""

    def __init__(self, file: IO[bytes], memory: IO[bytes], *, move: bool) -> None:
        super().__init__(file, protocol=5)
        self._memory, self._move = memory, move
        # The tensors stay referred to: a number is a tensor's only as long as that lives.
        self._placed: dict[int, tuple[Tensor, int, _Place]] = {}

    def persistent_id(self, obj: Any) -> tuple[int, _Place] | None:
        """Return the number and place of a tensor; the same for a tensor met again, as tied weights are."""
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._placed:
            self._placed[id(obj)] = (obj, len(self._placed), self._write(obj))
        return self._placed[id(obj)][1:]

    def _write(self, tensor: Tensor) -> _Place:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise SharingError(
                f"tensors must be plain ones to be used by several processes; got {type(tensor).__name__}"
            )
        # Each tensor begins on a page, so that it can be mapped on its own and moved as soon as it is written.
        offset = -(-self._memory.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._memory.seek(offset)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._memory.write(content.data)
        self._memory.flush()
        place = _Place(
            offset, tuple(tensor.shape), tensor.dtype, isinstance(tensor, nn.Parameter), tensor.requires_grad
        )
        if self._move:
            tensor.data = place.map(self._memory.fileno())
        return place


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], file_descriptor: int, device: str) -> None:
        super().__init__(file)
        self._file_descriptor, self._device = file_descriptor, device
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, pid: tuple[int, _Place]) -> Tensor:
        number, place = pid
        if number not in self._tensors:
            tensor = place.map(self._file_descriptor).to(self._device)
            self._tensors[number] = (
                nn.Parameter(tensor, place.requires_grad)
                if place.is_parameter
                else tensor.requires_grad_(place.requires_grad)
            )
        return self._tensors[number]
