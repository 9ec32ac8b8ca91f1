"""Every figure on the page comes through these files: what is written must come back, whatever was interrupted."""

import json
import logging
import math
from pathlib import Path

import pytest

from flexlora import FlexLoraError
from flexlora.rounds.records import (
    ReferencesRecord,
    RoundRecord,
    append_record,
    read_manifest,
    read_records,
    read_references,
    to_line,
    write_manifest,
    write_references,
)


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_rounds_come_back_as_they_were_written(tmp_path: Path, records: list[RoundRecord]) -> None:
    path = tmp_path / "records.jsonl"
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
    assert path.read_text().count("\n") == len(records)


def test_a_line_names_what_checks_rely_on(records: list[RoundRecord]) -> None:
    line = json.loads(to_line(records[3]))
    assert line["server_round"] == 3
    assert {"client_id", "ranks", "num_examples", "up_bytes", "down_bytes", "outcome"} <= line["clients"][0].keys()
    assert line["evaluation"]["unseen"]["rouge_l"] == records[3].evaluation.unseen.rouge_l


def test_nan_and_infinity_survive_strict_json(tmp_path: Path, broken_numbers: RoundRecord) -> None:
    json.loads(to_line(broken_numbers), parse_constant=refuse)
    append_record(tmp_path / "records.jsonl", broken_numbers)
    (back,) = read_records(tmp_path / "records.jsonl")
    assert back.learning_rate == math.inf
    assert back.energy_above_smallest == -math.inf
    assert math.isnan(back.train_loss)
    assert math.isnan(back.spectra["a.q_proj"].singular_values[1])
    assert to_line(back) == to_line(broken_numbers)


def test_line_separators_inside_a_string_do_not_split_a_line(tmp_path: Path) -> None:
    record = RoundRecord(server_round=0, note="one\u2028two\x85three\r\nfour")
    append_record(tmp_path / "records.jsonl", record)
    assert read_records(tmp_path / "records.jsonl") == [record]


def test_a_missing_file_holds_no_rounds_and_no_references(tmp_path: Path) -> None:
    assert read_records(tmp_path / "records.jsonl") == []
    assert read_references(tmp_path / "references.json") == ReferencesRecord()
    assert read_manifest(tmp_path / "manifest.json") is None


def test_references_of_earlier_runs_read_and_lack_what_was_not_measured_then(tmp_path: Path) -> None:
    run = '{"rank":"1","ranks":{},"learning_rate":null,"evaluations":[],"final":null,"up_bytes":5,"down_bytes":6}'
    path = tmp_path / "references.json"
    path.write_text(f'{{"base":null,"local_only":null,"fedit_smallest_rank":{run}}}')
    found = read_references(path)
    assert found.fedit_smallest_rank is not None and found.fedit_smallest_rank.num_clients is None
    assert (found.fedit_smallest_rank.up_bytes, found.fedit_largest_rank, found.large_clients_alone) == (5, None, None)


@pytest.mark.parametrize("kept_bytes", [1, 17, 400, -2])
def test_a_line_cut_off_by_a_kill_is_dropped_and_reported(
    tmp_path: Path, records: list[RoundRecord], kept_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "records.jsonl"
    for record in records[:3]:
        append_record(path, record)
    with path.open("ab") as file:
        file.write(to_line(records[3]).encode()[:kept_bytes])
    with caplog.at_level(logging.WARNING):
        assert read_records(path) == records[:3]
    assert "incomplete last line" in caplog.text
    append_record(path, records[3])
    assert read_records(path) == records[:4]


def test_a_last_line_that_lacks_only_its_break_is_kept(tmp_path: Path, records: list[RoundRecord]) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(to_line(records[0]).rstrip("\n"))
    assert read_records(path) == records[:1]
    append_record(path, records[1])
    assert read_records(path) == records[:2]


def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, records: list[RoundRecord]) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(to_line(records[0]) + '{"server_round": 1, "speed": 3}\n' + to_line(records[2]))
    with pytest.raises(FlexLoraError, match=r"records.jsonl, line 2, is not a round record: speed"):
        read_records(path)


def test_rounds_out_of_order_are_an_error(tmp_path: Path, records: list[RoundRecord]) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(to_line(records[4]) + to_line(records[4]))
    with pytest.raises(FlexLoraError, match="rounds must ascend; got round 4 after round 4"):
        read_records(path)


def test_references_and_manifest_come_back(whole_run: Path, running_run: Path) -> None:
    references = read_references(whole_run / "references.json")
    write_references(running_run / "references.json", references)
    assert read_references(running_run / "references.json") == references
    assert read_manifest(running_run / "manifest.json") == read_manifest(whole_run / "manifest.json")
    assert not list(running_run.glob("*.partial"))


def test_a_damaged_manifest_is_an_error_that_says_where(whole_run: Path) -> None:
    path = whole_run / "manifest.json"
    text = path.read_text().replace('"seed": 42', '"seed": "many"')
    # As an earlier version wrote it, without its digest.
    path.write_text(text[: text.index(',"digest"')] + "}")
    with pytest.raises(FlexLoraError, match=r"manifest.json is not what it should be: seed"):
        read_manifest(path)


def test_a_changed_letter_in_references_or_manifest_is_noticed(whole_run: Path) -> None:
    write_references(whole_run / "references.json", read_references(whole_run / "references.json"))
    manifest = read_manifest(whole_run / "manifest.json")
    assert manifest is not None
    write_manifest(whole_run / "manifest.json", manifest)
    for name, read in (("references.json", read_references), ("manifest.json", read_manifest)):
        content = (whole_run / name).read_bytes()
        place = content.index(b"1")
        (whole_run / name).write_bytes(content[:place] + b"3" + content[place + 1 :])
        with pytest.raises(FlexLoraError, match=rf"{name} is not what it should be: it does not have the digest"):
            read(whole_run / name)
