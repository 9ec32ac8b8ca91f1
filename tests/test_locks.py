"""One process at a time writes to a folder, and a lock outlives no process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.errors import FlexLoraError
from flexlora.locks import LOCK_FILE, locked

HOLDER = """
import sys, time
from pathlib import Path
from flexlora.errors import FlexLoraError
from flexlora.locks import locked
with locked(Path(sys.argv[1]), FlexLoraError):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FlexLoraError, match=rf"process {holder.pid}\Z"), locked(folder, FlexLoraError):
            pytest.fail("both hold it")
        assert (folder / LOCK_FILE).exists()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
    # The file is still there, and counts for nothing.
    with locked(folder, FlexLoraError):
        assert (folder / LOCK_FILE).read_text().split()[0] == str(os.getpid())
    assert list(folder.iterdir()) == []


def test_a_folder_that_nothing_was_put_into_is_removed_again(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "run", FlexLoraError):
        assert (tmp_path / "a" / "run" / LOCK_FILE).is_file()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "run", FlexLoraError):
        (tmp_path / "a" / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["kept"]


def test_a_process_cannot_hold_a_folder_twice(tmp_path: Path) -> None:
    with (
        locked(tmp_path, FlexLoraError),
        pytest.raises(FlexLoraError, match=f"process {os.getpid()}"),
        locked(tmp_path, FlexLoraError),
    ):
        pytest.fail("held twice")


def test_a_lock_file_of_somebody_else_names_no_process(tmp_path: Path) -> None:
    with locked(tmp_path, FlexLoraError):
        (tmp_path / LOCK_FILE).write_bytes(b"\xff\x1b[31m")
        with pytest.raises(FlexLoraError, match=r"another process\Z"), locked(tmp_path, FlexLoraError):
            pytest.fail("held twice")
