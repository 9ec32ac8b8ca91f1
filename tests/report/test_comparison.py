"""Runs side by side: their names, their target, and what makes them incomparable."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexlora import FlexLoraError
from flexlora.cli import app
from flexlora.report.comparison import comparison_notes, distinct_names, timed_runs
from flexlora.report.page import write_report
from flexlora.report.run_folder import read_run
from flexlora.rounds.records import EvaluationRecord, ManifestRecord, RoundRecord, append_record, write_manifest


def section_of(page: Path) -> str:
    """Return the text of the page on virtual time."""
    section = page.read_text(encoding="utf-8").split('<section id="virtual-time"')[1].split("</section>")[0]
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section)))


def test_a_target_may_be_asked_for_or_come_from_the_run(
    folders: list[Path], tmp_path: Path, rounds_of: Callable[..., list[RoundRecord]], folder_of: Callable[..., Path]
) -> None:
    runs, target = timed_runs(read_run(folders[0]), [read_run(folders[1])], 20.5)
    assert target == 20.5
    assert [(run.name, run.seconds_to(target)) for run in runs] == [
        ("patient", 400.0),
        ("hasty", 40.0),
        ("FedIT, smallest rank", None),
    ]
    own = folder_of(tmp_path / "own", "wait", rounds_of({0: 1.0, 4: 9.0}, 1.0), target=8.0)
    assert timed_runs(read_run(own))[1] == 8.0


def test_the_command_line_compares_runs_too(folders: list[Path]) -> None:
    names = [str(folder) for folder in folders]
    page = folders[0].parent / "compared.html"
    told = CliRunner().invoke(app, ["report", *names, "--target", "22", "--json", "--out", str(page)])
    found = json.loads(told.stdout)
    assert (found["report"], found["target_rouge_l"]) == (str(page), 22.0)
    assert found["virtual_seconds_to_target"] == {"patient": 400.0, "hasty": 40.0, "FedIT, smallest rank": None}
    assert page.exists() and not (folders[0] / "report.html").exists()
    with pytest.raises(FlexLoraError, match="there is no folder nowhere"):
        CliRunner().invoke(app, ["report", names[0], "nowhere"], catch_exceptions=False)


def test_names_are_the_shortest_endings_that_differ() -> None:
    def named(*paths: str) -> list[str]:
        return distinct_names([Path(path) for path in paths])

    assert named("/r/a/x", "/r/b/x", "/r/b/y") == ["a/x", "b/x", "y"]
    assert named("/a/p/x", "/b/p/x", "/x") == ["a/p/x", "b/p/x", "/x"]
    assert named("/r/x") == ["x"]


def test_runs_of_one_name_are_told_apart_and_a_run_named_twice_counts_once(
    tmp_path: Path, rounds_of: Callable[..., list[RoundRecord]], folder_of: Callable[..., Path]
) -> None:
    scores = {"a": {0: 5.0, 4: 30.0}, "b": {0: 5.0, 2: 25.0}}
    runs = [str(folder_of(tmp_path / name / "x", "wait", rounds_of(scores[name], 10.0))) for name in "ab"]
    out = ["--out", str(tmp_path / "compared.html")]
    told = CliRunner().invoke(app, ["report", *runs, f"{runs[1]}/../x", "--json", *out])
    assert json.loads(told.stdout)["virtual_seconds_to_target"] == {"a/x": 40.0, "b/x": 20.0}
    write_report(Path(runs[0]), [Path(runs[1]), Path(f"{runs[1]}/../x")])
    text = section_of(Path(runs[0]) / "report.html")
    assert text.count("b/x wait 4") == 1 and "a/x (wait)" in text


def test_a_run_that_never_learned_has_no_say_in_the_target(
    tmp_path: Path, rounds_of: Callable[..., list[RoundRecord]], folder_of: Callable[..., Path]
) -> None:
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


def test_runs_that_differ_in_their_task_are_shown_with_a_warning(
    tmp_path: Path,
    rounds_of: Callable[..., list[RoundRecord]],
    manifest_of: Callable[..., ManifestRecord],
    folder_of: Callable[..., Path],
) -> None:
    changes = {
        "first": {"unseen": "1", "clients": "2"},
        "same": {"unseen": "1", "clients": "2"},
        "other": {"unseen": "3", "clients": "2"},
        "odd": {"unseen": "3", "clients": "2"},
    }
    for name, hashes in changes.items():
        folder = folder_of(tmp_path / name, "wait", rounds_of({0: 5.0, 4: 25.0}, 10.0))
        write_manifest(folder / "manifest.json", manifest_of("wait", data_hashes=hashes))
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


def test_runs_without_a_virtual_clock_are_named(
    folders: list[Path],
    tmp_path: Path,
    evaluation_of: Callable[..., EvaluationRecord],
    manifest_of: Callable[..., ManifestRecord],
) -> None:
    plain, new = tmp_path / "plain", tmp_path / "new"
    for path in (plain, new):
        path.mkdir()
        write_manifest(path / "manifest.json", manifest_of("wait"))
    append_record(plain / "records.jsonl", RoundRecord(server_round=0, evaluation=evaluation_of(3)))
    missing = [
        "plain is left out: it has no virtual clock (devices.profiles gives it one).",
        "new is left out: it has not begun yet.",
    ]
    out = ["--out", str(tmp_path / "compared.html")]
    told = CliRunner().invoke(app, ["report", str(folders[0]), str(plain), str(new), *out], env={"COLUMNS": "150"})
    assert all(line in told.stdout for line in missing)
    write_report(plain, [new])
    assert all(line in section_of(plain / "report.html") for line in missing)
    assert comparison_notes(read_run(plain)) == []


@pytest.mark.parametrize("target", ["nan", "-5", "1000", "inf"])
def test_a_target_that_is_no_rouge_l_is_refused(folders: list[Path], target: str) -> None:
    with pytest.raises(FlexLoraError, match=f"--target must be a ROUGE-L between 0 and 100.*; got {target}"):
        CliRunner().invoke(app, ["report", str(folders[0]), "--target", target], catch_exceptions=False)
    assert not (folders[0] / "report.html").exists()
