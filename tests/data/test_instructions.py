"""Instruction data from a file to a corpus: columns for labels and owners, and what is left out."""

import json
import os
from pathlib import Path

import pytest

from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instructions import load_instructions

SHARED = Path(os.environ.get("FLEXLORA_SHARED", Path(__file__).parents[2].parent / "shared"))


def rows(num):
    return [
        {
            "instruction": f"question {n}",
            "context": f"context {n}" if n % 2 else "",
            "response": f"answer {n}",
            "category": "abc"[n % 3],
            "owner": f"owner {n % 5}",
        }
        for n in range(num)
    ]


def write_lines(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def everything(splits):
    return (*splits.train, *splits.validation, *splits.test)


def test_rows_without_an_answer_or_a_prompt_are_left_out_and_counted(tmp_path):
    empty = [
        {"instruction": "q", "response": " "},
        {"instruction": "", "response": "a"},
        {"instruction": "q", "response": None},
    ]
    file = write_lines(tmp_path / "data.jsonl", [*rows(60), *empty])
    _, summary = load_instructions(file, 0, num_clients=2)
    assert (summary.num_rows, summary.num_empty) == (63, 3)


def test_every_answer_to_a_repeated_prompt_is_trained_and_none_straddles_splits(tmp_path):
    again = [{**row, "response": "another answer"} for row in rows(200)]
    file = write_lines(tmp_path / "data.jsonl", [*rows(200), *again])
    corpus, summary = load_instructions(file, 0, num_clients=4)
    trained = [example for splits in corpus.clients.values() for example in splits.train]
    tested = [
        example for splits in corpus.clients.values() for part in (splits.validation, splits.test) for example in part
    ]
    assert summary.num_repeated == 200
    assert len({example.instruction for example in trained}) == len(trained) / 2
    assert all(len(example.outputs) == 1 for example in trained) and all(len(own.outputs) == 2 for own in tested)
    assert len({example.instruction for example in [*trained, *tested]}) == len(trained) / 2 + len(tested) == 200


def test_two_hundred_answers_to_ten_prompts_are_all_dealt(tmp_path):
    content = [{"prompt": f"question {n % 10}", "completion": f"answer {n}"} for n in range(200)]
    corpus, summary = load_instructions(write_lines(tmp_path / "data.jsonl", content), 0, num_clients=1)
    (splits,) = corpus.clients.values()
    # One of ten prompts is for validation and one for testing; each has 20 answers.
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (160, 1, 1)
    assert sorted(len(example.outputs) for example in everything(splits)) == [1] * 160 + [20] * 2
    assert summary.num_train == 160


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "natural"}, "needs the owner of every row; set data.client_column"),
        ({"partition": "dirichlet"}, "data.partition=dirichlet needs a label for every row; set data.label_column"),
        ({"unseen_labels": ("a",)}, "data.unseen_labels needs a label for every row"),
        ({"label_column": "kind"}, "line 1: there is no column 'kind'; found the columns instruction, context"),
    ],
)
def test_requests_that_lack_something_are_refused(tmp_path, options, message):
    with pytest.raises(InstructionDataError, match=message):
        load_instructions(write_lines(tmp_path / "data.jsonl", rows(40)), 0, **options)


def test_a_row_without_an_owner_is_refused(tmp_path):
    file = write_lines(tmp_path / "data.jsonl", [*rows(30), {**rows(1)[0], "owner": None}])
    with pytest.raises(InstructionDataError, match="line 31: column 'owner' must name the owner of the row"):
        load_instructions(file, 0, partition="natural", client_column="owner")


def test_a_file_without_rows_is_refused(tmp_path):
    file = write_lines(tmp_path / "data.jsonl", [])
    with pytest.raises(InstructionDataError, match=r"data.jsonl holds no row"):
        load_instructions(file, 0)


@pytest.mark.skipif(
    not (SHARED / "data" / "dolly").is_dir(),
    reason="needs data/dolly; set FLEXLORA_SHARED to the folder that holds data/",
)
def test_dolly_is_dealt_to_two_hundred_clients():
    corpus, summary = load_instructions(
        SHARED / "data" / "dolly" / "databricks-dolly-15k.jsonl",
        0,
        partition="dirichlet",
        num_clients=200,
        label_column="category",
        unseen_labels=("closed_qa",),
    )
    assert (summary.num_rows, summary.num_clients, summary.num_empty) == (13510, 200, 0)
    assert min(len(everything(splits)) for splits in corpus.clients.values()) >= 10
    assert set(corpus.unseen) == {"closed_qa"}


@pytest.mark.parametrize("owner", [None, "", "  "])
def test_an_empty_owner_is_no_client(tmp_path, owner):
    file = write_lines(tmp_path / "data.jsonl", [*rows(30), {**rows(1)[0], "owner": owner}])
    with pytest.raises(
        InstructionDataError, match="line 31: column 'owner' must name the owner of the row; got nothing"
    ):
        load_instructions(file, 0, partition="natural", client_column="owner")


def test_the_name_of_a_file_can_be_the_owner(tmp_path):
    for name in ("north.JSONL", "south.jsonl"):
        write_lines(tmp_path / name, [{**row, "instruction": f"{name} {row['instruction']}"} for row in rows(20)])
    corpus, _ = load_instructions(tmp_path, 0, partition="natural", client_from="file")
    assert {name: len(everything(splits)) for name, splits in corpus.clients.items()} == {"north": 20, "south": 20}


def test_what_was_not_read_is_in_the_summary(tmp_path):
    write_lines(tmp_path / "site.jsonl", rows(40))
    (tmp_path / "site.xlsx").write_bytes(b"")
    _, summary = load_instructions(tmp_path, 0, num_clients=2)
    text = " ".join(summary.notes)
    assert "site.xlsx" in text and "Not used: category, owner." in text


def test_answers_keep_their_leading_spaces_from_the_file_to_the_client(tmp_path):
    content = [{"prompt": f"q {n}", "completion": f"    return {n}\n"} for n in range(10)]
    corpus, _ = load_instructions(write_lines(tmp_path / "code.jsonl", content), 0, num_clients=1)
    (splits,) = corpus.clients.values()
    assert {example.outputs[0] for example in everything(splits)} == {row["completion"] for row in content}


@pytest.mark.parametrize(("prompt", "answer"), [("instruction", "output"), ("prompt", "completion")])
def test_a_column_that_tells_rows_of_one_prompt_apart_makes_them_ones_to_hold_out(tmp_path, prompt, answer):
    lines = [json.dumps({prompt: "q", answer: f"a{n}", "case": f"c{n}"}) for n in range(60)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InstructionDataError, match="all 60 share one prompt"):
        load_instructions(tmp_path / "d.jsonl", 0, num_clients=2, unseen_fraction=0.1)
    options = {"num_clients": 2, "unseen_fraction": 0.1, "columns": {"context": "case"}}
    _, summary = load_instructions(tmp_path / "d.jsonl", 0, **options)
    assert (summary.num_clients, summary.num_unseen_test) == (2, 6)
