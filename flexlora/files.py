"""Files and folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def appearing_whole(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a ``with`` block a folder to fill that takes the name ``folder`` when the block ends well.

    With ``replace`` off, a folder of that name that holds something stays, and an OSError says so.
    """
    with making_parents(folder):
        workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}-", dir=folder.parent))
        try:
            partial = workspace / "new"
            partial.mkdir()
            yield partial
            for path in sorted(partial.rglob("*")):
                _flush(path)
            _flush(partial)
            if replace and folder.exists():
                folder.rename(workspace / "old")
            partial.rename(folder)
            _flush(folder.parent)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def making_parents(path: Path) -> Iterator[None]:
    """Make the folders that ``path`` lies in for a ``with`` block; those of them that it leaves empty are removed."""
    new = [parent for parent in path.absolute().parents if not os.path.lexists(parent)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()


def _flush(path: Path) -> None:
    """Make sure that a file or the entries of a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
