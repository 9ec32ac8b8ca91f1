"""Times to a target, by hand."""

import html
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexlora import FlexLoraError
from flexlora.cli import app
from flexlora.report.comparison import comparison_notes, distinct_names, timed_runs
from flexlora.report.page import write_report
from flexlora.report.run_folder import read_run
from flexlora.report.virtual_time import common_target, device_table, timed_run, virtual_cells
from flexlora.rounds.records import (
    ClientRecord,
    EvaluationRecord,
    ManifestRecord,
    ReferenceRunRecord,
    ReferencesRecord,
    RoundRecord,
    RoundScoreRecord,
    ScoreRecord,
    append_record,
    write_manifest,
    write_references,
)


def evaluation(rouge_l: float) -> EvaluationRecord:
    score = ScoreRecord(rouge_l=rouge_l, exact_match=0, loss=1, num_examples=4, num_tasks=2)
    return EvaluationRecord(unseen=score, unseen_unweighted=score, validation_loss=3 - rouge_l / 20)


def client(device: str, seconds: float, outcome: str = "ok", staleness: int = 0) -> ClientRecord:
    return ClientRecord(
        client_id=f"{device}-{seconds}",
        plan=device,
        ranks={"q": 1},
        num_examples=3,
        up_bytes=10,
        down_bytes=20,
        outcome=outcome,  # type: ignore[arg-type]
        stage=None if outcome == "ok" else "train",
        reason=None if outcome == "ok" else "late",
        device=device,
        virtual_seconds=seconds,
        staleness=staleness,
    )


def rounds_of(scores: dict[int, float], seconds: float, num_rounds: int = 4) -> list[RoundRecord]:
    """Return rounds of equal length; those in ``scores`` were evaluated."""
    records = []
    for number in range(num_rounds + 1):
        clients = [client("pc", 2.0, staleness=number), client("tv", 8.0, "failed")] if number else []
        records.append(
            RoundRecord(
                server_round=number,
                clients=clients,
                up_bytes=10 * len(clients),
                down_bytes=20 * len(clients),
                num_ok=len(clients) // 2,
                num_failed=len(clients) // 2,
                evaluation=evaluation(scores[number]) if number in scores else None,
                virtual_seconds=seconds if number else 0.0,
                virtual_clock_seconds=number * seconds,
            )
        )
    return records


def manifest(policy: str, target: float | None = None, **changes: object) -> ManifestRecord:
    record = ManifestRecord(
        flexlora_version="0",
        python="3",
        platform="x",
        seed=0,
        config_hash="0",
        base_model="b",
        num_parameters=1,
        method="flexlora",
        num_clients=5,
        num_unseen_tasks=2,
        policy=policy,
        device_counts={"pc": 2, "tv": 2, "watch": 1},
        target_rouge_l=target,
    )
    return record.model_copy(update=changes)


def folder_of(path: Path, policy: str, records: list[RoundRecord], target: float | None = None) -> Path:
    path.mkdir(parents=True)
    for record in records:
        append_record(path / "records.jsonl", record)
    write_manifest(path / "manifest.json", manifest(policy, target))
    return path


def test_the_time_to_a_target_is_that_of_the_first_evaluation_that_reached_it() -> None:
    run = timed_run("slow", rounds_of({0: 5.0, 2: 20.0, 3: 18.0, 4: 30.0}, 100.0), manifest("wait"))
    assert run is not None
    assert (run.seconds, run.num_rounds, run.best_rouge_l, run.num_ok, run.num_failed) == (400.0, 4, 30.0, 4, 4)
    assert [run.seconds_to(target) for target in (4.0, 19.0, 20.0, 20.1, 31.0, None)] == [
        0.0,
        200.0,
        200.0,
        400.0,
        None,
        None,
    ]
    assert virtual_cells(run, 31.0)[-1] == "not reached"
    assert virtual_cells(run, 19.0)[-1] == "3 min 20 s"


def test_a_run_without_virtual_time_is_none() -> None:
    assert timed_run("plain", [RoundRecord(server_round=0, evaluation=evaluation(3))], None) is None


def test_without_a_target_it_is_the_best_of_the_weakest_run() -> None:
    runs = [
        run
        for scores in ({0: 5.0, 4: 30.0}, {0: 5.0, 2: 24.0, 4: 22.0})
        if (run := timed_run("r", rounds_of(scores, 1.0), None))
    ]
    assert common_target(runs) == 24.0
    assert common_target(runs, 7.0) == 7.0
    assert common_target([]) is None


def test_devices_are_summed_up_quickest_first() -> None:
    rows = device_table(rounds_of({}, 1.0), manifest("async"))
    assert [(row.device, row.num_clients, row.num_sent, row.num_ok, row.num_failed) for row in rows] == [
        ("pc", 2, 4, 4, 0),
        ("tv", 2, 4, 0, 4),
        ("watch", 1, 0, 0, 0),
    ]
    assert (rows[0].seconds_each, rows[0].staleness_each, rows[0].up_bytes) == (2.0, 2.5, 40)
    assert rows[1].seconds_each is None and rows[1].down_bytes == 80


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    wait = folder_of(tmp_path / "patient", "wait", rounds_of({0: 5.0, 2: 20.0, 4: 30.0}, 100.0))
    reference = ReferenceRunRecord(
        rank="1 in every module",
        evaluations=[
            RoundScoreRecord(server_round=n, unseen=evaluation(4.0 * n).unseen, virtual_clock_seconds=50.0 * n)
            for n in (0, 2, 4)
        ],
        final=evaluation(16.0),
    )
    write_references(wait / "references.json", ReferencesRecord(fedit_smallest_rank=reference))
    hasty = folder_of(tmp_path / "hasty", "async", rounds_of({0: 5.0, 4: 25.0}, 10.0))
    return [wait, hasty]


def test_the_page_compares_runs_on_the_virtual_clock(folders: list[Path]) -> None:
    page = write_report(folders[0], folders[1:]).read_text(encoding="utf-8")
    section = page.split('<section id="virtual-time"')[1].split("</section>")[0]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section))
    # The weakest of the three, the reference, reached 16; the others did so after 200 and 40 seconds.
    assert "Time to ROUGE-L 16.0" in text
    assert re.search(r"patient wait 4 6 min 40 s .* 30\.0 3 min 20 s hasty async 4 40\.0 s .* 25\.0 40\.0 s", text)
    assert re.search(r"FedIT, smallest rank wait 4 3 min 20 s – – .* 16\.0 3 min 20 s", text)
    assert "ROUGE-L on unseen tasks over virtual time" in text and "over virtual minutes" in text
    assert "Validation loss over virtual time" in text
    assert re.search(r"watch 1 0 0 0 – –", text)


def test_a_target_may_be_asked_for_or_come_from_the_run(folders: list[Path], tmp_path: Path) -> None:
    runs, target = timed_runs(read_run(folders[0]), [read_run(folders[1])], 20.5)
    assert target == 20.5
    assert [(run.name, run.seconds_to(target)) for run in runs] == [
        ("patient", 400.0),
        ("hasty", 40.0),
        ("FedIT, smallest rank", None),
    ]
    own = folder_of(tmp_path / "own", "wait", rounds_of({0: 1.0, 4: 9.0}, 1.0), target=8.0)
    assert timed_runs(read_run(own))[1] == 8.0


def test_a_run_without_devices_says_so(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.mkdir()
    append_record(path / "records.jsonl", RoundRecord(server_round=0, evaluation=evaluation(3)))
    assert "No devices were simulated." in write_report(path).read_text(encoding="utf-8")


def test_the_command_line_compares_runs_too(folders: list[Path]) -> None:
    names = [str(folder) for folder in folders]
    told = CliRunner().invoke(app, ["report", *names, "--target", "22", "--json"])
    assert json.loads(told.stdout) == {
        "report": str(folders[0] / "report.html"),
        "target_rouge_l": 22.0,
        "virtual_seconds_to_target": {"patient": 400.0, "hasty": 40.0, "FedIT, smallest rank": None},
        "notes": [],
    }
    with pytest.raises(FlexLoraError, match="there is no folder nowhere"):
        CliRunner().invoke(app, ["report", names[0], "nowhere"], catch_exceptions=False)


def section_of(page: Path) -> str:
    """Return the text of the page on virtual time."""
    section = page.read_text(encoding="utf-8").split('<section id="virtual-time"')[1].split("</section>")[0]
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section)))


def test_names_are_the_shortest_endings_that_differ() -> None:
    def named(*paths: str) -> list[str]:
        return distinct_names([Path(path) for path in paths])

    assert named("/r/a/x", "/r/b/x", "/r/b/y") == ["a/x", "b/x", "y"]
    assert named("/a/p/x", "/b/p/x", "/x") == ["a/p/x", "b/p/x", "/x"]
    assert named("/r/x") == ["x"]


def test_runs_of_one_name_are_told_apart_and_a_run_named_twice_counts_once(tmp_path: Path) -> None:
    scores = {"a": {0: 5.0, 4: 30.0}, "b": {0: 5.0, 2: 25.0}}
    runs = [str(folder_of(tmp_path / name / "x", "wait", rounds_of(scores[name], 10.0))) for name in "ab"]
    told = CliRunner().invoke(app, ["report", *runs, f"{runs[1]}/../x", "--json"])
    assert json.loads(told.stdout)["virtual_seconds_to_target"] == {"a/x": 40.0, "b/x": 20.0}
    text = section_of(Path(runs[0]) / "report.html")
    assert text.count("b/x wait 4") == 1 and "a/x (wait)" in text


def test_a_run_that_never_learned_has_no_say_in_the_target(tmp_path: Path) -> None:
    flat = folder_of(tmp_path / "flat", "wait", rounds_of({0: 5.0, 2: 5.0, 4: 3.0}, 10.0))
    good = folder_of(tmp_path / "good", "wait", rounds_of({0: 5.0, 4: 25.0}, 10.0))
    runs, target = timed_runs(read_run(flat), [read_run(good)])
    assert (target, [run.seconds_to(target) for run in runs]) == (25.0, [None, 40.0])
    assert comparison_notes(read_run(flat), [read_run(good)]) == [
        "The target is chosen without flat, which never scored above the base model."
    ]
    # A target that was asked for is nobody's choice.
    assert comparison_notes(read_run(flat), [read_run(good)], 4.0) == []
    assert timed_runs(read_run(flat))[1] is None
    write_report(flat)
    assert "No run has scored above its base model, so there is no target" in section_of(flat / "report.html")
    assert re.search(r"Time to target flat wait 4 .* 5\.0 – ", section_of(flat / "report.html"))


def test_runs_that_differ_in_their_task_are_shown_with_a_warning(tmp_path: Path) -> None:
    changes = {
        "first": {"unseen": "1", "clients": "2"},
        "same": {"unseen": "1", "clients": "2"},
        "other": {"unseen": "3", "clients": "2"},
        "odd": {"unseen": "3", "clients": "2"},
    }
    for name, hashes in changes.items():
        folder = folder_of(tmp_path / name, "wait", rounds_of({0: 5.0, 4: 25.0}, 10.0))
        write_manifest(folder / "manifest.json", manifest("wait", data_hashes=hashes))
        tokens = 16 if name == "odd" else 32
        (folder / "config.yaml").write_text(f"evaluation: {{max_new_tokens: {tokens}, batch_size: {len(name)}}}\n")
    run, *others = (read_run(tmp_path / name) for name in changes)
    assert comparison_notes(run, others) == [
        "Not comparable as they stand: first and other differ in the unseen tasks.",
        "Not comparable as they stand: first and odd differ in the unseen tasks and evaluation.max_new_tokens.",
    ]
    assert comparison_notes(run, others[:1]) == []
    write_report(run.path, [other.path for other in others])
    assert "Not comparable as they stand: first and other differ" in section_of(run.path / "report.html")


def test_a_config_that_cannot_be_read_does_not_end_a_comparison(folders: list[Path]) -> None:
    (folders[1] / "config.yaml").write_text("data: [")
    assert comparison_notes(read_run(folders[0]), [read_run(folders[1])]) == []


def test_runs_without_a_virtual_clock_are_named(folders: list[Path], tmp_path: Path) -> None:
    plain, new = tmp_path / "plain", tmp_path / "new"
    for path in (plain, new):
        path.mkdir()
        write_manifest(path / "manifest.json", manifest("wait"))
    append_record(plain / "records.jsonl", RoundRecord(server_round=0, evaluation=evaluation(3)))
    missing = [
        "plain is left out: it has no virtual clock (devices.profiles gives it one).",
        "new is left out: it has not begun yet.",
    ]
    told = CliRunner().invoke(app, ["report", str(folders[0]), str(plain), str(new)], env={"COLUMNS": "150"})
    assert all(line in told.stdout for line in missing)
    # Nothing to compare at all is no reason to say nothing.
    told = CliRunner().invoke(app, ["report", str(plain), str(new)], env={"COLUMNS": "150"})
    assert all(line in told.stdout for line in missing)
    assert all(line in section_of(plain / "report.html") for line in missing)
    assert comparison_notes(read_run(plain)) == []


@pytest.mark.parametrize("target", ["nan", "-5", "1000", "inf"])
def test_a_target_that_is_no_rouge_l_is_refused(folders: list[Path], target: str) -> None:
    with pytest.raises(FlexLoraError, match=f"--target must be a ROUGE-L between 0 and 100.*; got {target}"):
        CliRunner().invoke(app, ["report", str(folders[0]), "--target", target], catch_exceptions=False)
    assert not (folders[0] / "report.html").exists()
