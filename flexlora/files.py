"""Writes files and folders that appear whole or not at all.

New content is written beside its place, brought to the disk and only then given its name, and the entry of that name is
brought to the disk too. A process or a machine that stops at any instant leaves the old content or the new. Replacing a
folder that holds something takes two renames: for an instant between them, the old folder lies in a hidden one beside
its place.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
"""Ending of the name of a file that is being written, behind the number of the process that writes it."""


_PARTIAL_NAME = re.compile(rf"(?P<whole>.+?)(\.\d+)?{re.escape(PARTIAL)}", re.DOTALL)


def whole_name(name: str) -> str:
    """Return the name that a file will have when it is written; its own if it is no partial one."""
    partial = _PARTIAL_NAME.fullmatch(name)
    return name if partial is None else partial["whole"]


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file, replacing one of that name.

    Args:
        path: In a folder that exists. While this runs, there is a file beside it whose `whole_name` is that of `path`.
            Two processes may write the same file; the later one stays.
        content: Text is written as UTF-8.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def appearing_whole(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """Give a ``with`` block a folder to fill, which takes the name ``folder`` if the block ends without an error.

    Files in it get the permissions that the umask allows, those of libraries that let only the owner read included.
    A process that is killed in the block leaves a hidden folder ``.name-xxxxxxxx`` beside ``folder``.

    Args:
        folder: Folders above it are made where they are missing.
        replace: Whether a folder of that name is replaced. If not, one that holds something stays, and an OSError says
            so.
    """
    with making_parents(folder):
        workspace = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}-", dir=folder.parent))
        try:
            partial = workspace / "new"
            partial.mkdir()
            yield partial
            permissions = partial.stat().st_mode & 0o666
            for path in sorted(partial.rglob("*")):
                if path.is_file():
                    path.chmod(path.stat().st_mode | permissions)
                sync(path)
            sync(partial)
            _rename(partial, folder, workspace / "old" if replace else None)
            sync(folder.parent)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def making_parents(path: Path) -> Iterator[None]:
    """Make the folders above ``path`` for a ``with`` block; those of them that are empty at its end are removed."""
    new = [parent for parent in path.absolute().parents if not os.path.lexists(parent)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in new:
            sync(parent.parent)
        yield
    finally:
        for parent in new:
            with suppress(OSError):
                parent.rmdir()


def file_above(path: Path) -> Path | None:
    """Return the file that stands where a folder above ``path`` would have to be; None where nothing is in the way."""
    parents = (*path.parents, *path.absolute().parents)
    nearest = next((parent for parent in parents if os.path.lexists(parent)), None)
    return None if nearest is None or nearest.is_dir() else nearest


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do this for folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _rename(partial: Path, folder: Path, aside: Path | None) -> None:
    """Give ``partial`` the name ``folder``, having moved what has that name to ``aside``."""
    if aside is None or not folder.exists():
        partial.rename(folder)
        return
    try:
        folder.rename(aside)
        partial.rename(folder)
    except BaseException:
        if not folder.exists():
            aside.rename(folder)
        raise
