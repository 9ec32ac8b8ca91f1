"""No round of a run gets lost: lines are restored from checkpoints that hold them, or the run is not resumed."""

import codecs
import json
import logging
import shutil
from pathlib import Path

import pytest

from flexlora.errors import FlexLoraError
from flexlora.experiment.round_loop import rounds_stage
from flexlora.rounds.history import history_lines
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import line_digest


@pytest.fixture(name="whole")
def _whole(tmp_path, loop_in, drift) -> Path:
    """Returns the folder of a run of six rounds, whose two checkpoints hold rounds 5 and 6."""
    run_rounds(loop_in(tmp_path / "whole", drift, num_rounds=6))
    return tmp_path / "whole"


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "records.jsonl").read_bytes().splitlines(keepends=True)


def copied(whole: Path, lines: list[bytes] | None) -> Path:
    folder = whole.with_name("copy")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    if lines is None:
        (folder / "records.jsonl").unlink()
    else:
        (folder / "records.jsonl").write_bytes(b"".join(lines))
    return folder


def changed(line: bytes) -> bytes:
    """Return a line that still is a record, with another number in it."""
    record = json.loads(line)
    return json.dumps({**record, "up_bytes": record["up_bytes"] + 1}).encode() + b"\n"


def test_lines_that_a_checkpoint_holds_are_restored_to_the_byte_and_said(whole, loop_in, drift, caplog):
    lines = lines_of(whole)
    for damaged in ([*lines[:6], changed(lines[6])], [*lines[:5], lines[6]], [*lines[:5], b"{}\n", lines[6]]):
        folder = copied(whole, damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run_rounds(loop_in(folder, drift, num_rounds=6))
        assert lines_of(folder) == lines
        assert "restored from checkpoints" in caplog.text


@pytest.mark.parametrize("kind", ["garbage", "mark", "utf-16", "blank lines", "carriage returns"])
def test_what_an_editor_or_a_disk_does_to_lines_is_undone_if_nothing_is_lost(whole, loop_in, drift, kind):
    lines = lines_of(whole)
    content = b"".join(lines)
    changed = {
        "garbage": b"".join([*lines[:5], b"garbage\xff\n", lines[6]]),
        "mark": codecs.BOM_UTF8 + content,
        "utf-16": content.decode().encode("utf-16"),
        "blank lines": b"\n".join(lines) + b"\n \n",
        "carriage returns": content.replace(b"\n", b"\r\n"),
    }[kind]
    folder = copied(whole, [changed])
    loop = loop_in(folder, drift, num_rounds=6)
    # The bar of the rounds is drawn before the loop looks at the file.
    stage = rounds_stage("Federated rounds", loop)
    assert stage.completed == stage.num_steps
    run_rounds(loop)
    assert lines_of(folder) == lines


def test_a_last_line_that_a_kill_kept_from_being_written_is_no_damage(whole, loop_in, drift, caplog):
    folder = copied(whole, lines_of(whole)[:-1])
    with caplog.at_level(logging.WARNING):
        run_rounds(loop_in(folder, drift, num_rounds=6))
    assert lines_of(folder) == lines_of(whole)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["emptied", "deleted", "first lines gone", "a line in the middle changed"])
def test_what_no_checkpoint_holds_is_never_resumed_with_a_hole(whole, loop_in, drift, kind):
    lines = lines_of(whole)
    damaged = {
        "emptied": [],
        "deleted": None,
        "first lines gone": lines[2:],
        "a line in the middle changed": [*lines[:2], changed(lines[2]), *lines[3:]],
    }[kind]
    folder = copied(whole, damaged)
    # The checkpoint of the best round, which is round 0 here, holds its line.
    with pytest.raises(FlexLoraError, match="put a copy of the file back, or start anew with --overwrite") as refused:
        run_rounds(loop_in(folder, drift, num_rounds=8))
    assert {"emptied": "rounds 1 to 4 are missing", "deleted": "rounds 1 to 4 are missing"}.get(
        kind, "round 1 is missing" if kind == "first lines gone" else "round 2 is missing (damaged: line 3)"
    ) in str(refused.value)
    assert not (folder / "records.jsonl").exists() if damaged is None else lines_of(folder) == damaged


def test_a_run_goes_back_to_a_checkpoint_whose_rounds_are_all_on_record(whole, loop_in, drift):
    # Round 5 is damaged in the file, and the only checkpoint that holds it is round 5's own.
    lines = lines_of(whole)
    folder = copied(whole, [*lines[:5], changed(lines[5]), lines[6]])
    (folder / "checkpoints" / "round-0006" / "state.json").write_bytes(b"{}")
    run_rounds(loop_in(folder, drift, num_rounds=6))
    assert [json.loads(line)["server_round"] for line in lines_of(folder)] == list(range(7))
    assert lines_of(folder)[:6] == lines[:6]
    tensors = Path("checkpoints") / "round-0006" / "state.safetensors"
    assert (folder / tensors).read_bytes() == (whole / tensors).read_bytes()


def test_records_without_any_checkpoint_are_not_written_over(whole, loop_in, drift):
    folder = copied(whole, lines_of(whole))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FlexLoraError, match=r"has records of 7 rounds, and .* has no checkpoint to go on from"):
        run_rounds(loop_in(folder, drift, num_rounds=6))
    assert lines_of(folder) == lines_of(whole)


def test_a_run_of_an_earlier_version_has_no_digests_and_is_resumed(whole, loop_in, drift):
    tree = whole / "checkpoints" / "round-0006" / "state.json"
    description = json.loads(tree.read_bytes())
    del description["digest"], description["progress"]["loop"]["history"]
    tree.write_text(json.dumps({**description, "format_version": 1}))
    run_rounds(loop_in(whole, drift, num_rounds=8))
    assert [json.loads(line)["server_round"] for line in lines_of(whole)] == list(range(9))
    newest = json.loads((whole / "checkpoints" / "round-0008" / "state.json").read_bytes())
    assert newest["progress"]["loop"]["history"] == [line_digest(line) for line in lines_of(whole)[:8]]


def test_a_kept_history_keeps_the_bytes_of_its_lines(whole):
    lines = [line.rstrip() for line in lines_of(whole)]
    assert history_lines(whole / "records.jsonl", 3, whole / "checkpoints", ()) == lines[:4]
