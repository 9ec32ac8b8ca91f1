"""A comparison as a user runs it: to its end, killed and resumed to the same rows, and continued with more."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROWS = "rows.jsonl"
TIMES = ("seconds", "server_seconds", "client_seconds")
SETTINGS = (
    "data.num_clients=24",
    "data.num_unseen_tasks=4",
    "data.examples_per_task=12",
    "data.test_examples_per_task=2",
    "data.validation_examples=8",
    "rounds.num_rounds=2",
    "rounds.cohort_size=3",
    "training.max_steps=1",
    "model.device=cpu",
)


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "flexlora.cli",
        "compare",
        "configs/demo.yaml",
        *SETTINGS,
        "--out",
        str(folder),
        *more,
    ]


def compare(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *more), capture_output=True, text=True, check=False, timeout=900)


def rows_of(folder: Path) -> dict[tuple[object, ...], dict[str, object]]:
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    keys = ("phase", "draw", "distribution", "arm", "learning_rate")
    return {
        tuple(row[key] for key in keys): {key: value for key, value in row.items() if key not in TIMES} for row in rows
    }


METHODS = ("--methods", "flexlora,aligned", "--draws", "2", "--tuning-draws", "1", "--trials", "2", "--jobs", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "whole"
    done = compare(folder, *METHODS, "--no-text")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "aligned" in done.stdout
    return folder


def test_every_arm_has_every_draw_and_the_controls_are_there(finished: Path) -> None:
    rows = rows_of(finished)
    arms = {"base", "fedit_smallest", "fedit_largest", "large_alone", "centralised", "alone", "flexlora", "aligned"}
    assert {key[3] for key in rows if key[0] == "test"} == arms
    for arm in arms:
        assert len([key for key in rows if key[0] == "test" and key[3] == arm]) == 2, arm
    assert all(row["failure"] is None for row in rows.values()), [row["failure"] for row in rows.values()]


def test_tuning_runs_never_look_at_unseen_tasks(finished: Path) -> None:
    tuning = [row for key, row in rows_of(finished).items() if key[0] == "tuning"]
    assert tuning
    for row in tuning:
        assert row["unseen"] is None
        assert row["own_loss"] is None
        assert all(point["unseen_loss"] is None for point in row["curve"])  # type: ignore[index, attr-defined]


def test_a_page_and_numbers_are_left_behind(finished: Path) -> None:
    assert (finished / "report.html").stat().st_size > 10_000
    shown = subprocess.run(
        command(finished, *METHODS, "--no-text", "--json"), capture_output=True, text=True, check=True, timeout=300
    )
    assert json.loads(shown.stdout)["folder"] == str(finished)


def test_a_comparison_that_was_killed_goes_on_to_the_same_rows(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        command(folder, *METHODS, "--no-text"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 300
    while time.monotonic() < until and not ((folder / ROWS).exists() and len(rows_of(folder)) >= 3):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with (folder / ROWS).open("a") as file:
        file.write('{"kind": "run", "phase": "te')  # What a kill in the middle of a line leaves.
    assert len(rows_of_whole_lines(folder)) < len(rows_of(finished))
    done = compare(folder, *METHODS, "--no-text")
    assert done.returncode == 0, done.stderr[-3000:]
    assert rows_of(folder) == rows_of(finished)


def rows_of_whole_lines(folder: Path) -> list[str]:
    return (folder / ROWS).read_text().splitlines()[:-1]


def test_another_configuration_is_refused_and_nothing_is_lost(finished: Path) -> None:
    before = (finished / ROWS).read_bytes()
    done = compare(finished, *METHODS, "--no-text", "training.batch_size=2")
    assert done.returncode == 2
    assert "training.batch_size differ" in done.stderr
    assert (finished / ROWS).read_bytes() == before


def test_before_the_first_run_there_is_a_result_too(tmp_path: Path) -> None:
    done = compare(tmp_path / "none", "--methods", "flexlora", "--minutes", "0", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["page"] is None and found["summary"]["cells"] == []


def test_a_reference_that_is_no_arm_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = compare(tmp_path / "none", "--methods", "flexlora", "--reference", "nobody")
    assert done.returncode == 2 and "must be the label of an arm" in done.stderr
    assert not (tmp_path / "none").exists()


RAISING = """
from dataclasses import dataclass
from flexlora import Broadcast, LoraFactors, Traits, aggregation_method, spectrum_of

@aggregation_method("raising")
@dataclass(frozen=True)
class Raising:
    scaling: object
    traits = Traits(needs_one_rank=True)

    def init(self, adapter) -> dict[str, LoraFactors]:
        return dict(adapter)

    def aggregate(self, state, updates):
        raise RuntimeError("a bug of mine")

    def broadcast(self, state, ranks):
        return Broadcast({module: state[module] for module in sorted(ranks)})

    def spectra(self, state):
        return {module: spectrum_of(factors) for module, factors in state.items()}
"""


def test_a_method_that_raises_costs_its_own_runs_and_is_not_ranked(tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    methods = f"raising:path={tmp_path / 'raising.py'},flexlora"
    options = ("--draws", "1", "--tuning-draws", "0", "--no-controls", "--no-text", "--jobs", "1")
    label = methods.split(",")[0]
    done = compare(tmp_path / "cmp", "--methods", methods, *options, "--reference", "flexlora", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    failures = {key[3]: row["failure"] for key, row in rows_of(tmp_path / "cmp").items()}
    assert failures["flexlora"] is None and "a bug of mine" in str(failures[label])
    assert "a bug of mine" in (tmp_path / "cmp/report.html").read_text()
    (verdict,) = [one for one in json.loads(done.stdout)["summary"]["verdicts"] if one["measure"] == "unseen_loss"]
    assert verdict["left_out"] == [label] and verdict["first"] == "flexlora"
