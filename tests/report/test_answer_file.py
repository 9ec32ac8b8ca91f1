"""Answers of models side by side: kept as a whole, replaced model by model, readable whatever they hold."""

import json
from pathlib import Path

import pytest

from flexlora.report.answer_file import AnswerRecord, ModelAnswer, read_answers, write_answers
from flexlora.rounds.records import RecordsError

EXAMPLES = [
    AnswerRecord(task="a", category="x", number=0, prompt="Name it.", references=["snow"]),
    AnswerRecord(task="a", category="x", number=1, prompt="Name it\u2028again.", references=["ice", "frost"]),
]


def said(*texts: str) -> list[ModelAnswer]:
    return [ModelAnswer(text=text, rouge_l=50.0, exact_match=False) for text in texts]


def test_a_later_scoring_replaces_the_answers_of_its_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, EXAMPLES, {"base": said("b0", "b1")})
    write_answers(path, EXAMPLES, {"federated": said("f0", "f1")})
    write_answers(path, EXAMPLES, {"federated": said("g0", "g1")})
    found = read_answers(path)
    assert [{name: one.text for name, one in record.answers.items()} for record in found] == [
        {"base": "b0", "federated": "g0"},
        {"base": "b1", "federated": "g1"},
    ]


def test_answers_to_other_examples_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, EXAMPLES, {"base": said("b0", "b1")})
    write_answers(path, EXAMPLES[:1], {"federated": said("f0")})
    assert [list(record.answers) for record in read_answers(path)] == [["federated"]]


def test_every_line_is_json_whatever_a_model_says(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, EXAMPLES, {"base": said("a\nb\x00\u2028", "lone \ud800 surrogate")})
    lines = path.read_bytes().split(b"\n")
    assert len(lines) == 3 and lines[-1] == b""
    assert [json.loads(line)["answers"]["base"]["text"] for line in lines[:-1]] == [
        "a\nb\x00\u2028",
        "lone \ud800 surrogate",
    ]


@pytest.mark.parametrize("damage", [b"{", b"[1]", b'{"task": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_line_is_named_and_does_not_stop_a_run(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, EXAMPLES, {"base": said("b0", "b1")})
    path.write_bytes(path.read_bytes() + damage + b"\n")
    with pytest.raises(RecordsError, match=r"answers\.jsonl, line 3, is not an example with answers"):
        read_answers(path)
    write_answers(path, EXAMPLES, {"federated": said("f0", "f1")})
    assert [list(record.answers) for record in read_answers(path)] == [["federated"]] * 2


def test_no_flipped_bit_of_an_answer_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write_answers(path, EXAMPLES, {"base": said("b0", "b1")})
    whole = path.read_bytes()
    for bit in range(0, 8 * (len(whole) - 1), 11):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(RecordsError, match="is not an example with answers"):
            read_answers(path)
