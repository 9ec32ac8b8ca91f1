"""The table of runs on the virtual clock, wide and narrow."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flexlora.report.comparison import timed_runs
from flexlora.report.run_folder import read_run
from flexlora.report.terminal import print_virtual_time


def told(folders: list[Path], width: int) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    run, *others = (read_run(folder) for folder in folders)
    print_virtual_time(console, *timed_runs(run, others, 20.5), ["[b] is a note."])
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_wide_terminal_shows_every_column_of_every_run(folders: list[Path]) -> None:
    rows = {line.split("│")[1].strip(): line for line in told(folders, 150).splitlines() if line.startswith("│")}
    assert list(rows) == ["patient", "hasty", "FedIT, smallest rank"]
    cells = [cell.strip() for cell in rows["patient"].strip("│").split("│")]
    # Four rounds of one success and one failure each, 60 bytes a round; 30 was reached after 400 seconds.
    assert cells == ["patient", "wait", "4", "4", "4", "240 B", "30.0", "6 min 40 s", "6 min 40 s"]
    assert "not reached" in rows["FedIT, smallest rank"]
    assert "[b] is a note." in told(folders, 150)


def test_a_narrow_terminal_leaves_columns_out(folders: list[Path]) -> None:
    assert "rounds" in told(folders, 150) and "rounds" not in told(folders, 80)


def test_without_a_virtual_clock_only_the_notes_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole_run: Path
) -> None:
    console = Console(file=StringIO(), width=150)
    print_virtual_time(console, *timed_runs(read_run(whole_run)), ["a note"])
    assert console.file.getvalue() == "a note\n"  # type: ignore[attr-defined]
