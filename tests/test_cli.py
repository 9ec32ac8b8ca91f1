"""How commands end, whatever the terminal can show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora import cli
from flexlora.rounds.records import RoundRecord, append_record
from flexlora.verbs.leaving import guarded, interruptible


@pytest.mark.parametrize(
    "encoding",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "C"],
)
def test_a_terminal_without_the_letters_of_a_name_shows_their_numbers(tmp_path: Path, encoding: dict[str, str]) -> None:
    (tmp_path / "naïve–run").mkdir()
    append_record(tmp_path / "naïve–run" / "records.jsonl", RoundRecord(server_round=0))
    command = [sys.executable, "-m", "flexlora.cli", "report", "naïve–run"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    done = subprocess.run(
        command, capture_output=True, cwd=tmp_path, env={**environment, **encoding, "COLUMNS": "150"}, timeout=120
    )
    assert (done.returncode, done.stderr.splitlines()) == (0, [b"Reading records and writing the page"])
    assert b"\\u2013run" in done.stdout or b"\\udce2\\udc80\\udc93run" in done.stdout


def interrupt(*arguments: object, **settings: object) -> None:
    raise KeyboardInterrupt


def test_an_interruption_anywhere_in_a_command_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexlora.experiment.config_file.load_config", interrupt)
    assert guarded(lambda: cli.app(["plan", "any.yaml"])) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert guarded(interrupt) == 130
    assert capsys.readouterr().err == "Interrupted.\n"

    def merge() -> None:
        with interruptible("nothing was written"):
            interrupt()

    assert guarded(merge) == 130
    assert capsys.readouterr().err == "Interrupted; nothing was written.\n"


def test_an_interruption_of_the_first_imports_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "flexlora.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
