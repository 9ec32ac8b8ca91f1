"""What the terminal shows: names of users as they are, whatever it can show, and how commands end."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flexlora import cli
from flexlora.experiment.doctor import Finding
from flexlora.experiment.estimate import DeviceRow, Plan, PlanRow
from flexlora.experiment.run import RunResult
from flexlora.experiment.stages import Stage
from flexlora.experiment.terminal import LiveProgress, print_evaluation, print_plan, print_summary
from flexlora.rounds.costs import ClientCost, DeviceCost
from flexlora.rounds.loop_parts import RoundEvent
from flexlora.rounds.records import (
    ClientRecord,
    EvaluationRecord,
    ReferencesRecord,
    RoundRecord,
    ScoreRecord,
    append_record,
)

NAMES = ("[/red] a/b", "old [/slow]", "pixel [arm64]", "pixel [x86]", "a:100:b")
SCORE = ScoreRecord(rouge_l=9, exact_match=0, loss=1, num_examples=4, num_tasks=2)


def terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, color_system=None, width=200, emoji=False)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def record(server_round: int, *clients: ClientRecord) -> RoundRecord:
    scores = EvaluationRecord(unseen=SCORE, unseen_unweighted=SCORE, categories={name: SCORE for name in NAMES})
    return RoundRecord(
        server_round=server_round,
        clients=list(clients),
        num_failed=len(clients),
        evaluation=scores,
        virtual_clock_seconds=5.0 * server_round,
    )


def failed(name: str) -> ClientRecord:
    return ClientRecord(client_id=name, plan=name, ranks={}, num_examples=1, outcome="failed", reason=f"{name} is late")


def test_a_plan_shows_names_of_types_devices_and_files_as_they_are() -> None:
    cost, device_cost = ClientCost(1, 2, 3, 4.0), DeviceCost(1, 2, 3, 4.0, 5.0, 6.0)
    types = [PlanRow(name, {f"{name}.q_proj": 8, "v_proj": 4}, 3, cost, 5) for name in NAMES]
    devices = [DeviceRow(name, "", {}, 1, 9.0, device_cost, "memory", {f"type {name}": "memory"}) for name in NAMES]
    console = terminal()
    print_plan(console, Plan([("Base model", f"models/{name}") for name in NAMES], types, NAMES, devices))
    for name in NAMES:
        assert shown(console).count(name) == 6  # Base model, type, device, note, and the verdict's device and type.


def test_progress_shows_stages_and_clients_as_they_are() -> None:
    console = terminal()
    with LiveProgress(console, hidden=False) as progress:
        progress(Stage("Training [/on] a", 3, notes=("[/note]",)))
        progress(RoundEvent("cohort", 1, 1))
        for name in NAMES[:4]:
            progress(RoundEvent("client", 1, 1, client=failed(name)))
            progress._progress.refresh()
            assert f"{name} failed" in shown(console)
        progress(RoundEvent("done", 1, 1, record=record(1, failed(NAMES[0]))))
    assert "Training [/on] a" in shown(console) and "[/note]" in shown(console)
    assert "first [/red] a/b: [/red] a/b is late" in shown(console)


@pytest.mark.parametrize("name", ["run [bold]", "[b]run"])
def test_results_show_folders_tasks_and_reasons_as_they_are(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    records = [record(0), record(1)]
    for one in records:
        append_record(folder / "records.jsonl", one)
    console = terminal()
    result = RunResult(folder, folder / "report.html", "flexlora", 1, "[/lost] gone", True, records, ReferencesRecord())
    print_summary(console, result)
    text = shown(console)
    assert f"Report   {folder}/report.html" in text and f"Adapters {folder}/adapters" in text
    assert "Stopped early: [/lost] gone" in text
    assert f"{name} " in text.split("On the virtual clock")[1].split("Stopped early")[0]
    assert "No run has scored above its base model, so there is no target" in text
    scores = records[1].evaluation
    assert scores is not None
    print_evaluation(console, {"base model": scores})
    assert all(f" {category} " in shown(console) for category in NAMES)


def test_the_doctor_names_extras_and_folders_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("ray", "in /opt/[/old]", False, "pip install 'flexlora[ray]', for clusters")]
    monkeypatch.setattr("flexlora.experiment.doctor.examine", lambda: found)
    text = CliRunner().invoke(cli.app, ["doctor"], env={"COLUMNS": "150"}, catch_exceptions=False).stdout
    assert "in /opt/[/old]" in text and "pip install 'flexlora[ray]', for clusters" in text


@pytest.mark.parametrize(
    "encoding",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "C"],
)
def test_a_terminal_without_the_letters_of_a_name_shows_their_numbers(tmp_path: Path, encoding: dict[str, str]) -> None:
    (tmp_path / "naïve–run").mkdir()
    append_record(tmp_path / "naïve–run" / "records.jsonl", record(0))
    command = [sys.executable, "-m", "flexlora.cli", "report", "naïve–run"]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONIOENCODING", "PYTHONUTF8")}
    done = subprocess.run(
        command, capture_output=True, cwd=tmp_path, env={**environment, **encoding, "COLUMNS": "150"}, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u2013run" in done.stdout or b"\\udce2\\udc80\\udc93run" in done.stdout


def interrupt(*arguments: object, **settings: object) -> None:
    raise KeyboardInterrupt


def test_an_interruption_anywhere_in_a_command_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexlora.experiment.config_file.load_config", interrupt)
    assert cli._guarded(lambda: cli.app(["plan", "any.yaml"])) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert cli._guarded(interrupt) == 130
    assert capsys.readouterr().err == "Interrupted.\n"

    def merge() -> None:
        with cli._interruptible("nothing was written"):
            interrupt()

    assert cli._guarded(merge) == 130
    assert capsys.readouterr().err == "Interrupted; nothing was written.\n"


def test_an_interruption_of_the_first_imports_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "flexlora.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
