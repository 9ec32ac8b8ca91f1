"""Opens data files, compressed ones too, as text or bytes, with one error for all that can be wrong with them."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from flexlora.data.data_files import kind_of
from flexlora.data.instruction_errors import InstructionDataError

_POINTER = b"version https://git-lfs.github.com/spec/"


@contextmanager
def opened_text(file: Path, newline: str = "") -> Iterator[IO[str]]:
    """Give a ``with`` block a file as text, line ends as they stand.

    Args:
        file: In UTF-8.
        newline: What ends a line; empty for whatever can.

    Raises:
        InstructionDataError: It is no UTF-8, its compression is broken, or it cannot be read; also from the block.
    """
    with opened_bytes(file) as content:
        try:
            yield io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline)
        except UnicodeDecodeError as error:
            raise InstructionDataError(
                f"{file} must be a readable file in UTF-8 ({error}); save it in UTF-8"
            ) from error


@contextmanager
def opened_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Give a ``with`` block the content of a file, decompressed.

    Raises:
        InstructionDataError: Its compression is broken or needs what is not installed, it cannot be read, or it is what
            git-lfs puts in the place of a file.
    """
    try:
        with file.open("rb") as content:
            if content.read(len(_POINTER)) == _POINTER:
                raise InstructionDataError(
                    f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in the repository"
                )
        with _open(file) as content:
            yield content
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InstructionDataError(f"{file} must be a whole, readable file ({error}); copy it again") from error


def _open(file: Path) -> IO[bytes]:
    compression = kind_of(file).compression
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}.get(compression)
    if opener is not None:
        return opener(file, "rb")
    try:
        import pyarrow
    except ImportError as error:
        raise InstructionDataError(
            f"{file}: files compressed with zstd need pip install 'flexlora[hub]'; or decompress it with unzstd"
        ) from error
    return io.BufferedReader(_Raw(pyarrow.input_stream(str(file), compression="zstd")))


class _Raw(io.RawIOBase):
    """Makes a stream of pyarrow one of Python's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, and return with how many bytes."""
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Close the stream below."""
        self._stream.close()
        super().close()
