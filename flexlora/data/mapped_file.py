"""Appends to a file and reads it through a mapping, so that its content is not in the process's own memory."""

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

from flexlora.errors import FlexLoraError

_UNWRITTEN_BYTES = 1 << 20


class MappedFileError(FlexLoraError, OSError):
    """The file is shorter than it should be."""


class MappedFile:
    """Holds bytes that one process appends and reads back from a mapping.

    Args:
        path: What exists there is kept and read; None takes a file without a name, which is deleted when the process
            ends, killed or not.
        writable: Whether anything will be appended.
    """

    def __init__(self, path: Path | None = None, *, writable: bool = True) -> None:
        self._file: BinaryIO = (
            tempfile.TemporaryFile() if path is None else path.open("a+b" if writable else "rb")  # type: ignore[assignment]
        )
        weakref.finalize(self, self._file.close)
        self._unwritten = bytearray()
        self._written = os.fstat(self._file.fileno()).st_size
        self._map: mmap.mmap | None = None

    @property
    def size(self) -> int:
        """Bytes it holds, those included that are still to be written."""
        return self._written + len(self._unwritten)

    def append(self, content: bytes) -> int:
        """Add bytes at the end and return where they begin."""
        start = self.size
        self._unwritten += content
        if len(self._unwritten) >= _UNWRITTEN_BYTES:
            self.flush()
        return start

    def flush(self) -> None:
        """Hand everything appended to the system."""
        if self._unwritten:
            self._file.seek(0, os.SEEK_END)
            self._file.write(self._unwritten)
            self._file.flush()
            self._written += len(self._unwritten)
            self._unwritten.clear()

    def view(self, start: int, size: int) -> memoryview:
        """Return bytes of the file without a copy; the view stays good when the file grows.

        Raises:
            MappedFileError: The file ends before.
        """
        stop = start + size
        if stop > self._written:
            self.flush()
        if size == 0:
            return memoryview(b"")
        if self._map is None or stop > len(self._map):
            # Views of an older mapping keep that one alive.
            if not 0 <= start <= stop <= os.fstat(self._file.fileno()).st_size:
                raise MappedFileError(f"{self._file.name} ends before byte {stop}; delete it, and it will be rebuilt")
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._map)[start:stop]
