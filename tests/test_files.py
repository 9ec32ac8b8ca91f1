"""Files and folders appear whole or not at all, whenever their writer is killed."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexlora.files import PARTIAL, appearing_whole, making_parents, sync, whole_name, write_whole

# Runs one writer again and again, each time in a folder of its own and killed one step later, until it is not killed.
# A step is anything that the file system can see: opening, syncing, naming, making, removing.
KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from flexlora.files import appearing_whole, write_whole

STEPS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.scandir"}
root, writer = Path(sys.argv[1]), sys.argv[2]

def fill(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "one").write_text(text)
    (folder / "two").write_text(text)

def prepare(folder):
    if writer == "file":
        (folder / "written").write_text("old")
    elif writer == "replaced":
        fill(folder / "written", "old")

def write(folder):
    if writer == "file":
        write_whole(folder / "written", "new")
    else:
        with appearing_whole(folder / "written", replace=writer == "replaced") as partial:
            fill(partial, "new")

def killed_at(last, folder):
    done, sync = 0, os.fsync
    def step(event):
        nonlocal done
        if event in STEPS:
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
    os.fsync = lambda descriptor: (step("open"), sync(descriptor))
    sys.addaudithook(lambda event, _: step(event))
    write(folder)
    os._exit(0)

for last in range(100):
    folder = root / f"{last:03d}"
    folder.mkdir()
    prepare(folder)
    child = os.fork()
    if child == 0:
        killed_at(last, folder)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def killed_at_every_step(root: Path, writer: str) -> list[Path]:
    """Return the folders that a writer was killed in, the last of them the one in which it was not."""
    command = [sys.executable, "-c", KILLED_AT_EVERY_STEP, str(root), writer]
    subprocess.run(command, check=True, timeout=120)
    folders = sorted(root.iterdir())
    assert 5 < len(folders) < 100
    return folders


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_is_old_or_new_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    *killed, finished = killed_at_every_step(tmp_path, "file")
    found = [(folder / "written").read_text() for folder in killed]
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True), "once new, never old again"
    assert {whole_name(path.name) for folder in killed for path in folder.iterdir()} == {"written"}
    assert content(finished) == {"written": "new"}


def test_a_new_folder_is_whole_or_absent_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    *killed, finished = killed_at_every_step(tmp_path, "new")
    found = [folder / "written" for folder in killed if (folder / "written").exists()]
    assert 0 < len(found) < len(killed)
    for folder in [*found, finished / "written"]:
        assert content(folder) == {"one": "new", "two": "new"}
    assert [path.name for path in finished.iterdir()] == ["written"]


def test_a_replaced_folder_is_old_or_new_or_for_one_instant_aside(tmp_path: Path) -> None:
    *killed, finished = killed_at_every_step(tmp_path, "replaced")
    num_aside = 0
    for folder in killed:
        if (folder / "written").exists():
            assert content(folder / "written") in ({"one": "old", "two": "old"}, {"one": "new", "two": "new"})
        else:
            num_aside += 1
            (hidden,) = folder.iterdir()
            assert content(hidden / "old") == {"one": "old", "two": "old"}
    assert num_aside == 1
    assert content(finished / "written") == {"one": "new", "two": "new"}
    assert [path.name for path in finished.iterdir()] == ["written"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What is synced and what is given a name, in order."""
    noted: list[tuple[str, Path]] = []

    def noting(name: str, place: Callable[..., Path]) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given: (noted.append((name, place(*given))), real(*given))[1])

    noting("fsync", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    noting("rename", lambda _, name: Path(name))
    noting("replace", lambda _, name: Path(name))
    return noted


def test_content_is_on_disk_before_its_name_and_the_name_after(tmp_path: Path, steps: list[tuple[str, Path]]) -> None:
    path = tmp_path / "file"
    write_whole(path, b"content")
    partial = tmp_path / f"file.{os.getpid()}{PARTIAL}"
    assert steps == [("fsync", partial), ("replace", path), ("fsync", tmp_path)]


def test_the_name_of_a_partial_file_tells_which_file_it_will_be(tmp_path: Path) -> None:
    assert [whole_name(name) for name in ("a.json.12.partial", "a.json.partial", "a.json", "partial", "a.1.html")] == [
        "a.json",
        "a.json",
        "a.json",
        "partial",
        "a.1.html",
    ]


def test_all_of_a_folder_is_on_disk_before_its_name_and_all_names_after(
    tmp_path: Path, steps: list[tuple[str, Path]]
) -> None:
    folder = tmp_path / "above" / "folder"
    with appearing_whole(folder) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("content")
    synced = [partial / "inner", partial / "inner" / "file", partial]
    assert steps == [
        ("fsync", tmp_path),
        *(("fsync", path) for path in synced),
        ("rename", folder),
        ("fsync", folder.parent),
    ]


def test_text_is_written_as_utf_8_and_bytes_as_they_are(tmp_path: Path) -> None:
    write_whole(tmp_path / "text", "né\r\n")
    write_whole(tmp_path / "bytes", b"n\xe9\r\n")
    assert (tmp_path / "text").read_bytes() == b"n\xc3\xa9\r\n"
    assert (tmp_path / "bytes").read_bytes() == b"n\xe9\r\n"


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(tmp_path / "file", "new")
    assert content(tmp_path) == {"file": "old"}


def test_a_folder_comes_back_when_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(OSError, match="Input/output error"), appearing_whole(folder) as partial:
        (partial / "file").write_text("new")
    assert content(folder) == {"file": "old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_holds_something_stays_where_none_is_to_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with appearing_whole(folder, replace=False) as partial:
        (partial / "file").write_text("first")
    with pytest.raises(OSError, match="not empty"), appearing_whole(folder, replace=False) as partial:
        (partial / "file").write_text("second")
    assert content(folder) == {"file": "first"}
    assert list(tmp_path.iterdir()) == [folder]


def test_an_error_in_the_block_leaves_nothing_not_even_folders_above(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), appearing_whole(tmp_path / "a" / "b" / "folder") as partial:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_files_that_only_their_owner_may_read_get_the_permissions_of_all_others(tmp_path: Path) -> None:
    with appearing_whole(tmp_path / "folder") as partial:
        for name in ("open", "private", "program"):
            (partial / name).write_text("")
        (partial / "private").chmod(0o600)
        (partial / "program").chmod(0o700)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "folder").iterdir()}
    assert modes["private"] == modes["open"]
    assert modes["program"] & 0o777 == modes["open"] | 0o100


def test_folders_above_are_made_and_go_again_if_nothing_is_put_into_them(tmp_path: Path) -> None:
    with making_parents(tmp_path / "kept" / "file"):
        (tmp_path / "kept" / "file").write_text("content")
    with making_parents(tmp_path / "left" / "deep" / "file"):
        assert (tmp_path / "left" / "deep").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_file_system_that_cannot_sync_folders_is_put_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("content")
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


def failing(number: int) -> Callable[[int], None]:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    return fail
