"""Examples with an owner, from any iterable, become the clients that a file with the same rows gives."""

import json
import math
import tracemalloc

import pytest

from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_schemas import RowReader
from flexlora.data.instructions import load_instructions
from flexlora.data.owned_examples import OwnedExample, load_owned_examples, rows_of


def rows(num=200, num_owners=5):
    return [
        {
            "owner": f"owner {n % num_owners}",
            "label": "abc"[n % 3],
            "instruction": f"question {n % 150}",
            "input": f"context {n % 150}" if n % 2 else "",
            "output": f"answer {n}",
        }
        for n in range(num)
    ]


def as_objects(content):
    return [
        OwnedExample(row["owner"], row["instruction"], row["output"], input=row["input"], label=row["label"])
        for row in content
    ]


def as_pairs(content):
    return [(row["owner"], Example(row["instruction"], row["input"], (row["output"],))) for row in content]


@pytest.mark.parametrize("held_out", [{}, {"unseen_fraction": 0.1}, {"unseen_labels": ("b",)}])
def test_the_corpus_is_the_one_a_file_with_the_same_rows_gives(tmp_path, held_out):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    columns = {"client_column": "owner", "label_column": "label"}
    expected = load_instructions(file, 3, partition="natural", num_clients=4, **columns, **held_out)
    assert load_owned_examples(iter(rows()), 3, num_clients=4, **held_out) == expected
    assert load_owned_examples(as_objects(rows()), 3, num_clients=4, **held_out) == expected


def test_pairs_of_an_owner_and_an_example_are_rows_without_a_label():
    unlabelled = [{name: value for name, value in row.items() if name != "label"} for row in rows()]
    assert load_owned_examples(as_pairs(rows()), 0) == load_owned_examples(unlabelled, 0)


def test_rows_of_all_three_kinds_may_be_mixed():
    content = rows(90)
    mixed = [*content[:30], *as_objects(content)[30:60], *as_pairs(content)[60:]]
    _, summary = load_owned_examples(mixed, 0)
    assert (summary.num_rows, summary.num_clients) == (90, 5)


def test_owners_may_be_held_out_as_unseen_tasks():
    corpus, summary = load_owned_examples(rows(), 0, unseen_owners=("owner 1", "owner 4"))
    assert list(corpus.clients) == ["owner 0", "owner 2", "owner 3"]
    assert list(corpus.unseen) == ["owner 1", "owner 4"] and summary.num_unseen == 2
    trained = {example.instruction for splits in corpus.clients.values() for example in splits.train}
    for splits in corpus.unseen.values():
        assert not splits.train and not splits.validation
        assert splits.test and not trained & {example.instruction for example in splits.test}


def test_numbers_are_names_of_owners_too():
    content = [row | {"owner": n % 4} for n, row in enumerate(rows())]
    corpus, _ = load_owned_examples(content, 0, unseen_owners=(3,))
    assert (list(corpus.clients), list(corpus.unseen)) == (["0", "1", "2"], ["3"])


def test_empty_answers_do_not_count_and_white_space_stays():
    (row, empty) = rows_of(
        [OwnedExample("x", " Do. ", ("  Done. ", " ", "  Done. "), history=[("user", " Hi ")])] * 1
        + [OwnedExample("x", "q", " ")]
    )
    assert row.examples == (Example(" Do. ", "", ("  Done. ",), history=(("user", " Hi "),)),)
    assert empty.examples == ()


def test_conversations_are_read_from_mappings():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (row,) = rows_of([{"owner": "x", "messages": messages, "label": math.nan}])
    assert (row.examples, row.client, row.label) == ((Example("Hi", "", ("Hello",)),), "x", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "c"}, "data, row 2: there is no 'owner'; found the columns prompt, completion"),
        (
            {"owner": None, "instruction": "p", "output": "c"},
            "data, row 2: 'owner' must name who has the row; got None",
        ),
        ({"owner": math.nan, "instruction": "p", "output": "c"}, "row 2: 'owner' must name who has the row; got nan"),
        ({"owner": "", "instruction": "p", "output": "c"}, "row 2: 'owner' must name who has the row; got ''"),
        (
            {"owner": True, "instruction": "p", "output": "c"},
            "row 2: 'owner' must be a text or a whole number; got True",
        ),
        ({"owner": "x", "label": [1], "instruction": "p", "output": "c"}, "row 2: 'label' must be a text or a whole"),
        ({"owner": "x", "instruction": "p"}, "data, row 2: there is no 'response'; found the columns instruction"),
        ({"owner": "x", "instruction": 7, "output": "c"}, "data, row 2: 'instruction' must be a text; got 7"),
        (OwnedExample("x", "p", 7), "data, row 2: 'answer' must be a text; got 7"),  # type: ignore[arg-type]
        (OwnedExample("x", "p", ["a", 7]), "data, row 2: 'answer' must be a text or a list of texts"),  # type: ignore[list-item]
        (OwnedExample("x", "p", "a", history=[("narrator", "b")]), "data, row 2: 'history' must be pairs of a role"),
        (OwnedExample("x", "p", "a", history="Hi"), "data, row 2: 'history' must be .* pairs; got 'Hi'"),  # type: ignore[arg-type]
        (("x", Example("p", 7, ("a",))), "data, row 2: 'input' must be a text; got 7"),  # type: ignore[arg-type]
        (("x", "p"), r"data, row 2: must be an OwnedExample, an \(owner, Example\) pair or a mapping"),
        ("owner", "data, row 2: must be an OwnedExample.*; got 'owner'"),
    ],
)
def test_a_broken_row_is_refused_by_row_and_field(row, message):
    with pytest.raises(InstructionDataError, match=message):
        load_owned_examples([rows(1)[0], row], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unseen_owners": ("owner 9",)}, "unseen_owners must name owners of the data; 'owner 9' is not one"),
        ({"unseen_owners": ("owner 1",), "unseen_fraction": 0.1}, "only one of unseen_owners, unseen_labels and"),
        ({"min_examples": 2}, "data.min_examples must be 3 or more"),
        ({"num_clients": 6}, r"data.num_clients must be in 1..5, the natural clients"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(InstructionDataError, match=message):
        load_owned_examples(rows(), 0, **options)


def test_no_rows_are_refused():
    with pytest.raises(InstructionDataError, match="data holds no row"):
        load_owned_examples([], 0)


def test_texts_are_not_kept_in_memory():
    # 20 MB of texts, none twice; what stays is some bytes a row.
    def long_rows():
        for n in range(2000):
            yield OwnedExample(f"owner {n % 10}", f"{n} " + "x" * 10_000, "answer")

    tracemalloc.start()
    try:
        load_owned_examples(long_rows(), 0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


def test_halves_of_surrogate_pairs_are_replaced_in_every_kind_of_example():
    half, notes = "a\ud83d", DataNotes()
    given = [
        {"owner": half, "prompt": half, "completion": "c"},
        OwnedExample("x", half, [half], history=[("user", half)]),
        ("x", Example("p", half, ("c",))),
        {"owner": "x", "prompt": "p", "completion": "c"},
    ]
    found = list(rows_of(given, RowReader(notes, {})))
    assert repr(found).count("a\\ufffd") + repr(found).count("a\ufffd") == 6
    assert "ud83d" not in repr(found)
    assert notes.num_repaired == 3
