"""Instruction data from a file to a corpus: columns for labels and owners, and what is left out."""

import json
import os
from pathlib import Path

import pytest

from flexlora.data.instruction_files import InstructionDataError
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


def test_repeated_prompts_are_one_example_and_never_straddle_splits(tmp_path):
    again = [{**row, "response": "another answer"} for row in rows(200)]
    file = write_lines(tmp_path / "data.jsonl", [*rows(200), *again])
    corpus, summary = load_instructions(file, 0, num_clients=4)
    dealt = [example for splits in corpus.clients.values() for example in everything(splits)]
    assert summary.num_repeated == 200
    assert len(dealt) == len({example.instruction for example in dealt}) == 200
    assert all(len(example.outputs) == 2 for example in dealt)


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
