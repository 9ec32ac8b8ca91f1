"""Rows come back as they were written, and what is damaged is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexlora import FlexLoraError
from flexlora.report.paired import read_rows


def test_there_are_no_rows_before_the_first_run_ends(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "rows.jsonl") == []


@pytest.mark.parametrize("cut", [1, 40, -2])
def test_an_incomplete_last_line_is_dropped(tmp_path: Path, study_row: Callable[..., dict[str, Any]], cut: int) -> None:
    rows = [study_row("fedit", draw) for draw in range(2)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text + json.dumps(study_row("late"))[:cut])
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path, study_row: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(study_row("fedit")))
    assert len(read_rows(tmp_path / "rows.jsonl")) == 1


def test_a_repeated_run_replaces_the_first_and_other_kinds_are_no_rows(
    tmp_path: Path, study_row: Callable[..., dict[str, Any]]
) -> None:
    lines = [{"kind": "study", "name": "x"}, study_row("fedit", failure="killed"), study_row("fedit", loss=1.5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["unseen"]["loss"] == 1.5


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2: a row must be a JSON object; got list"),
        ('{"kind": "run", "phase": "test"}', "draw is missing or of a wrong type; got None"),
    ],
)
def test_a_damaged_line_is_named(
    tmp_path: Path, study_row: Callable[..., dict[str, Any]], line: str, said: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(study_row('fedit'))}\n{line}\n")
    with pytest.raises(FlexLoraError, match=said):
        read_rows(tmp_path / "rows.jsonl")


def test_an_unknown_phase_is_refused(tmp_path: Path, study_row: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(study_row("fedit", phase="training")) + "\n")
    with pytest.raises(FlexLoraError, match="one of tuning, test; got 'training'"):
        read_rows(tmp_path / "rows.jsonl")
