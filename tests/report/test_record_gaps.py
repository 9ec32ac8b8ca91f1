"""Rounds that a run has lost, or that somebody changed, are named wherever sums over rounds are shown."""

import hashlib
import json
from pathlib import Path

import pytest

from flexlora.report.page import write_report
from flexlora.report.run_folder import read_run
from flexlora.report.runs_page import summary_of
from flexlora.rounds.records import RoundRecord, append_record, to_line, write_manifest


@pytest.fixture(name="run")
def _run(tmp_path, rounds_of, manifest_of) -> Path:
    """Returns the folder of a run of four rounds whose checkpoint is that of the last, written by hand."""
    folder = tmp_path / "run"
    folder.mkdir()
    records: list[RoundRecord] = rounds_of({0: 1.0, 4: 2.0}, 1.0)
    for record in records:
        append_record(folder / "records.jsonl", record)
    lines = (folder / "records.jsonl").read_bytes().splitlines()
    place = folder / "checkpoints" / "round-0004"
    place.mkdir(parents=True)
    history = [hashlib.sha256(line).hexdigest()[:32] for line in lines[:4]]
    progress = {"loop": {"history": history}, "record": to_line(records[4])}
    (place / "state.json").write_text(json.dumps({"format_version": 1, "server_round": 4, "progress": progress}))
    write_manifest(folder / "manifest.json", manifest_of("wait", num_rounds=4))
    return folder


def rewrite(folder: Path, lines: list[bytes]) -> None:
    (folder / "records.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "records.jsonl").read_bytes().splitlines()


def test_nothing_is_said_of_a_whole_run(run: Path) -> None:
    assert read_run(run).gaps.in_words() == []
    assert "missing from" not in write_report(run).read_text()


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((0, 3, 4), "Of rounds 0 to 4, rounds 1 to 2 are missing from records.jsonl"),
        ((), "Of rounds 0 to 4, rounds 0 to 4 are missing from records.jsonl"),
        ((0, 1, 2, 3), "Of rounds 0 to 4, round 4 is missing from records.jsonl"),
        ((1, 2, 3, 4), "Of rounds 0 to 4, round 0 is missing from records.jsonl"),
    ],
)
def test_missing_rounds_are_named_on_the_page_and_beside_it(run: Path, kept: tuple[int, ...], words: str) -> None:
    rewrite(run, [lines_of(run)[place] for place in kept])
    assert words in write_report(run).read_text()
    notes = summary_of([read_run(run)])["notes"]
    assert [note for note in notes if words in note] == [f"run: {read_run(run).gaps.in_words()[0]}"]
    assert not any("is not finished" in note for note in notes)


def test_a_hole_is_seen_without_any_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "round-0004" / "state.json").write_bytes(b"\xff{")
    rewrite(run, [line for place, line in enumerate(lines_of(run)) if place != 2])
    assert read_run(run).gaps.missing == [2]


@pytest.mark.parametrize("place", [1, 4])
def test_a_line_that_is_another_valid_record_is_named(run: Path, place: int) -> None:
    lines = lines_of(run)
    rewrite(run, [line.replace(b'"down_bytes":40', b'"down_bytes":41') if n == place else line
                  for n, line in enumerate(lines)])  # fmt: skip
    assert lines_of(run)[place] != lines[place]
    words = f"records.jsonl is not as the run wrote it: round {place} is changed since"
    assert words in write_report(run).read_text()
    assert any(words in note for note in summary_of([read_run(run)])["notes"])


def test_a_round_that_waits_for_its_scores_is_not_missed(run: Path) -> None:
    path = run / "checkpoints" / "round-0004" / "state.json"
    description = json.loads(path.read_bytes())
    record = json.loads(description["progress"]["record"])
    description["progress"]["record"] = json.dumps({**record, "evaluation": None})
    path.write_text(json.dumps(description))
    rewrite(run, lines_of(run)[:4])
    assert read_run(run).gaps.in_words() == []
