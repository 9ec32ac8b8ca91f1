"""Files, schemas, rows and their errors, and how rows are dealt to clients."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from flexlora.data.examples import Example
from flexlora.data.instructions import InstructionDataError, load_instructions, read_instructions
from flexlora.data.partition import PartitionError

SHARED = Path(os.environ.get("FLEXLORA_SHARED", Path(__file__).parents[2].parent / "shared"))


def rows(num=200, labels=("a", "b", "c"), num_owners=5):
    return [
        {
            "instruction": f"question {n}",
            "context": f"context {n}" if n % 2 else "",
            "response": f"answer {n}",
            "category": labels[n % len(labels)],
            "owner": f"owner {n % num_owners}",
        }
        for n in range(num)
    ]


def write_lines(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def read(path, **options):
    return [example for row in read_instructions(path, **options) for example in row.examples]


def everything(splits):
    return (*splits.train, *splits.validation, *splits.test)


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path):
    content = rows(7)
    expected = [Example(row["instruction"], row["context"], (row["response"],)) for row in content]
    (tmp_path / "list.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_lines(tmp_path / "lines.json", content)
    write_lines(tmp_path / "lines.jsonl", content)
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    for file in tmp_path.iterdir():
        assert read(file) == expected, file


def test_parquet_files_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat}]), tmp_path / "chat.parquet")
    assert read(tmp_path / "chat.parquet") == [Example("Hi", "", ("Hello",))]
    (tmp_path / "chat.parquet").write_bytes(b"no parquet")
    with pytest.raises(InstructionDataError, match=r"chat.parquet must be a parquet file"):
        read(tmp_path / "chat.parquet")


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "part").mkdir()
    write_lines(tmp_path / "b.jsonl", rows(2))
    write_lines(tmp_path / "part" / "c.jsonl", rows(3))
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    assert len(read(tmp_path)) == 5


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": " Do. ", "response": "Done. "}, Example("Do.", "", ("Done.",))),
        ({"instruction": "Do.", "input": "it", "output": "Done."}, Example("Do.", "it", ("Done.",))),
        ({"instruction": "Do.", "context": None, "response": "Done."}, Example("Do.", "", ("Done.",))),
        (
            {"instruction": "Do.", "input": "", "output": ["Done.", "Ready.", " "]},
            Example("Do.", "", ("Done.", "Ready.")),
        ),
        ({"prompt": "Do it.", "completion": "Done."}, Example("Do it.", "", ("Done.",))),
    ],
)
def test_every_accepted_schema_becomes_an_example(tmp_path, row, expected):
    assert read(write_lines(tmp_path / "data.jsonl", [row])) == [expected]


def test_a_conversation_gives_one_example_per_answer_with_what_came_before_as_history(tmp_path):
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Farewell")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert read(write_lines(tmp_path / "chat.jsonl", [{"messages": messages}])) == [
        Example("Hi", "", ("Hello",), history=tuple(turns[:1])),
        Example("Bye", "", ("Farewell",), history=tuple(turns[:3])),
    ]


def test_messages_win_over_a_prompt_beside_them_and_renamed_columns_over_both(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"prompt": "P", "completion": "C", "messages": messages, "question": "Q", "reply": "R"}
    file = write_lines(tmp_path / "data.jsonl", [row])
    assert read(file) == [Example("Hi", "", ("Hello",))]
    assert read(file, columns={"instruction": "question", "response": "reply"}) == [Example("Q", "", ("R",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": 7, "context": "", "response": "a"}, "line 2: 'instruction' must be a text; got 7"),
        ({"instruction": "q", "context": ""}, "line 2: there is no 'response'; found the columns instruction, context"),
        ({"instruction": "q", "context": ["c"], "response": "a"}, "line 2: 'context' must be a text"),
        ({"instruction": "q", "context": "", "response": [1]}, "line 2: 'response' must be a text or a list of texts"),
    ],
)
def test_a_broken_row_is_refused_by_its_number(tmp_path, row, message):
    file = write_lines(tmp_path / "data.jsonl", [*rows(1), row])
    with pytest.raises(InstructionDataError, match=message) as caught:
        read(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "line 1: messages must be a list of turns; got 'Hi'"),
        (["Hi"], "line 1, turn 1: must be an object with role and content"),
        ([{"role": "user"}], "turn 1: there is no 'content'"),
        ([{"role": "tool", "content": "x"}], "turn 1: role must be system, user or assistant; got 'tool'"),
        (
            [{"role": "user", "content": "q"}, *[{"role": "assistant", "content": "a"}] * 2],
            "turn 3: an answer of the assistant must follow a turn of the user; got one after assistant",
        ),
    ],
)
def test_a_broken_conversation_is_refused_by_its_turn(tmp_path, messages, message):
    with pytest.raises(InstructionDataError, match=message):
        read(write_lines(tmp_path / "chat.jsonl", [{"messages": messages}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.jsonl",
            '{"a": 1}\n{',
            "data.jsonl, line 1: the columns must be messages .* found the columns a. Rename them",
        ),
        (
            "data.jsonl",
            '\n{"prompt": "p", "completion": "c"}\n{',
            "data.jsonl, line 3: must be one JSON object per line",
        ),
        ("data.jsonl", "7", "data.jsonl, line 1: a row must be a JSON object of columns; got 7"),
        ("data.json", "[{", r"data.json must be JSON"),
        ("data.json", "", "data.json holds no row"),
        (
            "data.csv",
            'prompt,completion\np,c\n"p,q",c,d',
            "data.csv, line 3: must have the 2 columns of the header; got 3",
        ),
        ("data.csv", 'prompt,completion\n"p" q,c', "data.csv, line 2: not valid CSV"),
        ("data.xlsx", "x", "files must end in .json, .jsonl, .csv, .parquet"),
    ],
)
def test_a_broken_file_is_refused_by_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InstructionDataError, match=message):
        read(tmp_path / name)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InstructionDataError, match="must be a readable file in UTF-8"):
        read(tmp_path / "data.jsonl")


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "nowhere.jsonl", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_before_the_hub_is_asked(path):
    with pytest.raises(InstructionDataError, match="there is no file or folder"):
        read(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InstructionDataError, match="must hold files that end in"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": "response"}, "data.columns must rename to messages, prompt, .*; got answer"),
        (
            {"instruction": "query"},
            "data.columns names the column 'query', which is not there; found the columns instr",
        ),
    ],
)
def test_wrong_renames_are_refused(tmp_path, columns, message):
    with pytest.raises(InstructionDataError, match=message):
        read(write_lines(tmp_path / "data.jsonl", rows(1)), columns=columns)


def test_rows_without_an_answer_or_a_prompt_are_left_out_and_counted(tmp_path):
    empty = [
        {"instruction": "q", "response": " "},
        {"instruction": "", "response": "a"},
        {"instruction": "q", "response": None},
    ]
    file = write_lines(tmp_path / "data.jsonl", [*rows(60), *empty])
    _, summary = load_instructions(file, 0, num_clients=2)
    assert (summary.num_rows, summary.num_empty) == (63, 3)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural"])
def test_every_row_has_one_owner_and_one_split(tmp_path, partition):
    file = write_lines(tmp_path / "data.jsonl", rows(200))
    options = {"label_column": "category", "client_column": "owner", "num_clients": 5}
    corpus, summary = load_instructions(file, 0, partition=partition, **options)
    dealt = Counter(example.instruction for splits in corpus.clients.values() for example in everything(splits))
    assert dealt == Counter(f"question {n}" for n in range(200))
    assert summary.num_train + summary.num_validation + summary.num_test == 200
    for splits in corpus.clients.values():
        size = len(everything(splits))
        assert size >= 10
        assert len(splits.test) == len(splits.validation) == max(1, round(size / 10))


def test_natural_clients_are_the_owners_of_their_rows(tmp_path):
    content = [*rows(100), *rows(3, num_owners=1)[:3]]
    content[-3:] = [{**row, "owner": "tiny", "instruction": "mine"} for row in content[-3:]]
    file = write_lines(tmp_path / "data.jsonl", content)
    corpus, summary = load_instructions(file, 0, partition="natural", client_column="owner")
    assert list(corpus.clients) == [f"owner {n}" for n in range(5)]
    assert summary.num_too_small == 1
    assert all(int(e.instruction.split()[1]) % 5 == 2 for e in everything(corpus.clients["owner 2"]))
    few, summary = load_instructions(file, 0, partition="natural", client_column="owner", num_clients=2)
    assert (len(few.clients), summary.num_not_drawn) == (2, 3)
    with pytest.raises(InstructionDataError, match=r"data.num_clients must be in 1..5, the natural clients"):
        load_instructions(file, 0, partition="natural", client_column="owner", num_clients=6)


def test_more_clients_than_rows_allow_are_refused_with_what_is_possible(tmp_path):
    file = write_lines(tmp_path / "data.jsonl", rows(200))
    for options in ({"partition": "iid"}, {"partition": "dirichlet", "label_column": "category"}):
        with pytest.raises(PartitionError, match=r"enough for 20: lower data.num_clients or data.min_examples"):
            load_instructions(file, 0, num_clients=21, **options)


def test_held_out_labels_are_unseen_tasks_that_no_client_has(tmp_path):
    file = write_lines(tmp_path / "data.jsonl", rows(300))
    options = {"partition": "dirichlet", "label_column": "category", "num_clients": 4}
    corpus, summary = load_instructions(file, 0, unseen_labels=("b", "c"), **options)
    assert {name: (len(splits.test), splits.category) for name, splits in corpus.unseen.items()} == {
        "b": (100, "b"),
        "c": (100, "c"),
    }
    assert {splits.category for splits in corpus.clients.values()} == {"a"}
    assert summary.num_unseen_test == 200
    with pytest.raises(InstructionDataError, match=r"data.unseen_labels must name labels of the data; 'z' is not one"):
        load_instructions(file, 0, unseen_labels=("z",), **options)
    with pytest.raises(InstructionDataError, match="no row is left for clients"):
        load_instructions(file, 0, unseen_labels=("a", "b", "c"), **options)


def test_a_fraction_is_held_out_where_no_label_is(tmp_path):
    file = write_lines(tmp_path / "data.jsonl", rows(200))
    corpus, _ = load_instructions(file, 0, num_clients=4, unseen_fraction=0.1)
    assert {name: len(splits.test) for name, splits in corpus.unseen.items()} == {"held-out": 20}
    labelled, _ = load_instructions(file, 0, num_clients=4, unseen_fraction=0.1, label_column="category")
    assert sum(len(splits.test) for splits in labelled.unseen.values()) == 20
    assert {splits.category for splits in labelled.unseen.values()} == {"a", "b", "c"}


def test_repeated_prompts_are_one_example_and_never_straddle_splits(tmp_path):
    again = [{**row, "response": "another answer"} for row in rows(200)]
    file = write_lines(tmp_path / "data.jsonl", [*rows(200), *again])
    corpus, summary = load_instructions(file, 0, num_clients=4)
    dealt = [example for splits in corpus.clients.values() for example in everything(splits)]
    assert summary.num_repeated == 200
    assert len(dealt) == len({example.instruction for example in dealt}) == 200
    assert all(len(example.outputs) == 2 for example in dealt)


def test_prompts_shared_by_two_natural_clients_are_not_scored_where_the_other_trains_on_them(tmp_path):
    content = [{**row, "owner": owner} for owner in ("x", "y") for row in rows(100)]
    corpus, summary = load_instructions(
        write_lines(tmp_path / "data.jsonl", content), 0, partition="natural", client_column="owner"
    )
    trained = {example.instruction for splits in corpus.clients.values() for example in splits.train}
    scored = {e.instruction for splits in corpus.clients.values() for e in (*splits.validation, *splits.test)}
    assert not trained & scored
    assert summary.num_leaked > 0


def test_answers_of_one_conversation_stay_together(tmp_path):
    turns = [("user", "{}"), ("assistant", "one {}"), ("user", "more {}"), ("assistant", "two {}")]
    content = [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(100)]
    corpus, _ = load_instructions(write_lines(tmp_path / "chat.jsonl", content), 0, num_clients=3)
    for splits in corpus.clients.values():
        for part in (splits.train, splits.validation, splits.test):
            assert len(part) % 2 == 0
            assert all(
                first.instruction == second.history[0][1] for first, second in zip(part[::2], part[1::2], strict=True)
            )


def test_dealing_is_a_function_of_the_seed(tmp_path):
    file = write_lines(tmp_path / "data.jsonl", rows(200))
    options = {"partition": "dirichlet", "label_column": "category", "num_clients": 5, "unseen_fraction": 0.1}
    assert load_instructions(file, 3, **options) == load_instructions(file, 3, **options)
    assert load_instructions(file, 3, **options) != load_instructions(file, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "natural"}, "needs the owner of every row; set data.client_column"),
        ({"partition": "dirichlet"}, "data.partition=dirichlet needs a label for every row; set data.label_column"),
        ({"unseen_labels": ("a",)}, "data.unseen_labels needs a label for every row"),
        ({"min_examples": 2}, "data.min_examples must be 3 or more"),
        ({"unseen_fraction": 1.0}, "data.unseen_fraction must be at least 0 and below 1; got 1.0"),
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


def test_a_hub_data_set_is_read_and_its_failure_explained(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"prompt": name, "completion": split}])
    assert read("org/name") == [Example("org/name", "", ("train",))]

    def fail(name, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InstructionDataError, match=r"org/name is no local file .*no route.*; check name and network"):
        read("org/name")


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
