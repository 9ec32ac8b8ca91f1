"""Rows for programs: whole numbers, CSV that reads back, and no formulas of other people."""

import csv
import io
import json
from pathlib import Path

import pytest

from flexlora.report.plain_rows import csv_text, json_text, task_rows
from flexlora.rounds.records import RoundRecord, read_references


def test_each_task_has_a_row_with_base_fedit_and_run(records: list[RoundRecord], whole_run: Path) -> None:
    rows = task_rows(records, read_references(whole_run / "references.json"))
    assert len(rows) == 8
    final = 12 + 30 * (1 - 0.75**12)
    assert rows[0]["task"] == "Sentiment Analysis 0" and rows[0]["category"] == "Sentiment Analysis"
    scored = [rows[0][key] for key in ("base_rouge_l", "fedit_smallest_rank_rouge_l", "rouge_l")]
    assert scored == [pytest.approx(0.65 * value) for value in (12, 32.9, final)]


def test_csv_reads_back_and_holds_no_formula() -> None:
    rows = [
        {"task": '=HYPERLINK("x")', "note": "two\nlines, and a comma", "value": -1.25},
        {"task": " @sum", "note": "plain - text", "value": None},
    ]
    back = list(csv.DictReader(io.StringIO(csv_text(rows), newline="")))
    assert [row["task"] for row in back] == ['\'=HYPERLINK("x")', "' @sum"]
    assert [row["note"] for row in back] == ["two\nlines, and a comma", "plain - text"]
    assert [row["value"] for row in back] == ["-1.25", ""]
    assert csv_text([]) == ""


def test_json_has_no_nan() -> None:
    assert json.loads(json_text({"a": [{"x": float("nan"), "y": float("-inf"), "z": 0.5}]})) == {
        "a": [{"x": None, "y": None, "z": 0.5}]
    }
