"""What a comparison says of each run, and that its page keeps up."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexlora.experiment.compare import CompareEvent, _event
from flexlora.experiment.compare_arms import read_arms
from flexlora.experiment.compare_jobs import Study
from flexlora.experiment.compare_progress import CompareProgress, FreshPage

ROW: dict[str, Any] = {
    "kind": "run",
    "phase": "test",
    "draw": 0,
    "distribution": "uniform",
    "arm": "[red]a",
    "learning_rate": 0.1,
    "validation_loss": 1.5,
    "unseen": {"loss": 2.5},
    "failure": None,
    "rounds": 2,
    "curve": [],
    "seconds": 30.0,
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "draw 1, uniform: [red]a at 0.1, validation loss 1.5000, unseen 2.5000"),
        ({"validation_loss": None}, "draw 1, uniform: [red]a at 0.1, unseen 2.5000"),
        ({"validation_loss": None, "unseen": None, "failure": "a bug"}, "[red]a at 0.1, failed: a bug"),
        ({"phase": "tuning", "unseen": None}, "tuning 1, uniform: [red]a at 0.1, validation loss 1.5000"),
    ],
)
def test_a_run_that_ended_is_said_in_one_line(changed: dict[str, Any], said: str) -> None:
    text = StringIO()
    with CompareProgress(Console(file=text, width=60)) as progress:
        progress(CompareEvent(ROW | changed, 1, 3, 120.0))
    assert any(line.strip().endswith(said) for line in text.getvalue().splitlines())


def test_minutes_left_know_that_scored_runs_take_longer() -> None:
    study = Study(
        config="demo.yaml",
        overrides=(),
        arms=read_arms("a=flexlora"),
        distributions=("uniform",),
        supports={"uniform": ()},
        draws=4,
        tuning_draws=1,
        trials=1,
        learning_rate=0.1,
        seed=0,
    )
    assert _event(study, [], 2).seconds_left is None
    tuned = ROW | {"arm": "a", "phase": "tuning", "unseen": None, "seconds": 10.0}
    assert _event(study, [tuned], 2).seconds_left == pytest.approx(4 * 10 / 2)
    rows = [tuned, ROW | {"arm": "a", "seconds": 50.0}]
    assert _event(study, [*rows, rows[1] | {"copy_of": "normal", "draw": 1}], 1).num_done == 2
    assert _event(study, rows, 2).seconds_left == pytest.approx(3 * 50 / 2)


def test_the_page_appears_with_the_first_run_and_a_damaged_row_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    fresh = FreshPage(tmp_path, "a")
    fresh(CompareEvent(None, 0, 4, None))
    assert not (tmp_path / "report.html").exists()
    fresh(CompareEvent(ROW, 1, 3, 1.0))
    assert (tmp_path / "report.html").exists()
    (tmp_path / "rows.jsonl").write_text("damaged\n" + json.dumps(ROW) + "\n")
    FreshPage(tmp_path, "a")(CompareEvent(ROW, 1, 3, 1.0))
