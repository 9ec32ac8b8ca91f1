"""Keeps a second process out of a folder that one is writing to; who only reads needs no lock."""

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from flexlora.errors import FlexLoraError
from flexlora.files import making_parents

try:
    import fcntl
except ImportError:  # On Windows, nobody keeps two processes apart.
    fcntl = None

LOCK_FILE = "lock"

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems answer that cannot lock."""

log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, refusal: Callable[[str], FlexLoraError]) -> Iterator[None]:
    """Hold the lock of a folder during a ``with`` block.

    The folder is made if it is missing, and removed again at the end if nothing was put into it. The system frees the
    lock of a process that ends, whatever it ends of.

    Args:
        folder: The folder.
        refusal: Returns the error to raise if another process holds the lock; it is given that process in words.
    """
    path = folder / LOCK_FILE
    with making_parents(path):
        file = _taken(path, refusal) if fcntl is not None else None
        try:
            yield
        finally:
            if file is not None:
                # While it is still locked, so that nobody can have locked a file without a name.
                path.unlink(missing_ok=True)
                file.close()


def _taken(path: Path, refusal: Callable[[str], FlexLoraError]) -> IO[bytes] | None:
    """Return the lock file, locked and with the name of this process in it; None where files cannot be locked."""
    assert fcntl is not None
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise refusal(holder) from None
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            if error.errno not in UNSUPPORTED:
                raise
            log.warning("%s is on a file system without locks; let one process at a time write there", path.parent)
            return None
        if _is_current(file, path):
            file.truncate(0)
            file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())
            file.flush()
            return file
        # The process before removed the file between our opening and locking it.
        file.close()


def _is_current(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[bytes]) -> str:
    """Return the process that a lock file names, in words."""
    file.seek(0)
    number, _, host = file.read(300).decode(errors="replace").strip().partition(" ")
    if not number.isdecimal():
        return "another process"
    return f"process {number}" + (f" on {host}" if host and host != socket.gethostname() else "")
