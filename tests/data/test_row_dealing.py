"""Rows dealt to clients: who has which, what is held out, and what is not scored."""

from collections import Counter
from dataclasses import replace

import pytest

from flexlora.data.corpus_file import ExampleFile
from flexlora.data.examples import Example
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.partition import PartitionError
from flexlora.data.row_dealing import RowDealing, deal_rows
from flexlora.data.rows import Row, StoredRows


def rows(num):
    return [
        Row((Example(f"question {n}", "", (f"answer {n}",)),), label="abc"[n % 3], client=f"owner {n % 5}")
        for n in range(num)
    ]


def deal(content, seed=0, **options):
    dealing = RowDealing(**options)
    stored = StoredRows(within_clients=dealing.partition == "natural")
    for row in content:
        stored.add(row)
    return deal_rows(stored, seed, dealing, ExampleFile(), "the data")


def everything(splits):
    return (*splits.train, *splits.validation, *splits.test)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural"])
def test_every_row_has_one_owner_and_one_split(partition):
    content = rows(200)
    corpus, summary = deal(content, partition=partition, num_clients=5)
    dealt = Counter(example.instruction for splits in corpus.clients.values() for example in everything(splits))
    assert dealt == Counter(f"question {n}" for n in range(200))
    assert summary.num_train + summary.num_validation + summary.num_test == 200
    for splits in corpus.clients.values():
        size = len(everything(splits))
        assert size >= 10
        assert len(splits.test) == len(splits.validation) == max(1, round(size / 10))


def test_natural_clients_are_the_owners_of_their_rows():
    content = [*rows(100), *(Row((Example(f"mine {n}", "", ("a",)),), client="tiny") for n in range(3))]
    corpus, summary = deal(content, partition="natural")
    assert list(corpus.clients) == [f"owner {n}" for n in range(5)]
    assert summary.num_too_small == 1
    assert all(int(e.instruction.split()[1]) % 5 == 2 for e in everything(corpus.clients["owner 2"]))
    few, summary = deal(content, partition="natural", num_clients=2)
    assert (len(few.clients), summary.num_not_drawn) == (2, 3)
    with pytest.raises(InstructionDataError, match=r"data.num_clients must be in 1..5, the natural clients"):
        deal(content, partition="natural", num_clients=6)


def test_more_clients_than_rows_allow_are_refused_with_what_is_possible():
    content = rows(200)
    for options in ({"partition": "iid"}, {"partition": "dirichlet"}):
        with pytest.raises(PartitionError, match=r"enough for 20: lower data.num_clients or data.min_examples"):
            deal(content, num_clients=21, **options)


def test_held_out_labels_are_unseen_tasks_that_no_client_has():
    content = rows(300)
    options = {"partition": "dirichlet", "num_clients": 4}
    corpus, summary = deal(content, unseen_labels=("b", "c"), **options)
    assert {name: (len(splits.test), splits.category) for name, splits in corpus.unseen.items()} == {
        "b": (100, "b"),
        "c": (100, "c"),
    }
    assert {splits.category for splits in corpus.clients.values()} == {"a"}
    assert summary.num_unseen_test == 200
    with pytest.raises(InstructionDataError, match=r"data.unseen_labels must name labels of the data; 'z' is not one"):
        deal(content, unseen_labels=("z",), **options)
    with pytest.raises(InstructionDataError, match="no row is left for clients"):
        deal(content, unseen_labels=("a", "b", "c"), **options)


def test_a_fraction_is_held_out_where_no_label_is():
    content = rows(200)
    unlabelled = [replace(row, label="") for row in content]
    corpus, _ = deal(unlabelled, num_clients=4, unseen_fraction=0.1)
    assert {name: len(splits.test) for name, splits in corpus.unseen.items()} == {"held-out": 20}
    labelled, _ = deal(content, num_clients=4, unseen_fraction=0.1)
    assert sum(len(splits.test) for splits in labelled.unseen.values()) == 20
    assert {splits.category for splits in labelled.unseen.values()} == {"a", "b", "c"}


def test_owners_held_out_are_unseen_tasks_with_the_category_of_their_rows():
    content = [replace(row, label="a") if row.client == "owner 1" else row for row in rows(100)]
    corpus, _ = deal(content, partition="natural", unseen_owners=("owner 1", "owner 2"))
    assert {name: (len(splits.test), splits.category) for name, splits in corpus.unseen.items()} == {
        "owner 1": (20, "a"),
        "owner 2": (20, ""),
    }
    assert list(corpus.clients) == ["owner 0", "owner 3", "owner 4"]
    with pytest.raises(InstructionDataError, match="unseen_owners must name owners of the data; 'owner' is not one"):
        deal(content, partition="natural", unseen_owners=("owner",))


def test_prompts_shared_by_two_natural_clients_are_not_scored_where_the_other_trains_on_them():
    content = [replace(row, client=owner) for owner in ("x", "y") for row in rows(100)]
    corpus, summary = deal(content, partition="natural")
    trained = {example.instruction for splits in corpus.clients.values() for example in splits.train}
    scored = {e.instruction for splits in corpus.clients.values() for e in (*splits.validation, *splits.test)}
    assert not trained & scored
    assert summary.num_leaked > 0


def test_answers_of_one_conversation_stay_together():
    content = [
        Row(
            (
                Example(f"{n}", "", (f"one {n}",)),
                Example(f"more {n}", "", (f"two {n}",), history=(("user", f"{n}"), ("assistant", f"one {n}"))),
            )
        )
        for n in range(100)
    ]
    corpus, _ = deal(content, num_clients=3)
    for splits in corpus.clients.values():
        for part in (splits.train, splits.validation, splits.test):
            assert len(part) % 2 == 0
            assert all(
                first.instruction == second.history[0][1] for first, second in zip(part[::2], part[1::2], strict=True)
            )


def test_dealing_is_a_function_of_the_seed():
    content = rows(200)
    options = {"partition": "dirichlet", "num_clients": 5, "unseen_fraction": 0.1}
    assert deal(content, 3, **options) == deal(content, 3, **options)
    assert deal(content, 3, **options) != deal(content, 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "even"}, "data.partition must be natural, dirichlet or iid; got 'even'"),
        ({"min_examples": 2}, "data.min_examples must be 3 or more"),
        ({"unseen_fraction": 1.0}, "data.unseen_fraction must be at least 0 and below 1; got 1.0"),
    ],
)
def test_impossible_dealings_are_refused(options, message):
    with pytest.raises(InstructionDataError, match=message):
        RowDealing(**options)


def test_clients_at_the_minimum_of_rows_are_counted():
    content = rows(3000)
    corpus, summary = deal(content, partition="dirichlet", num_clients=100, dirichlet_alpha=0.01)
    smallest = sum(len(everything(splits)) == 10 for splits in corpus.clients.values())
    assert smallest > 50
    assert any(f"{smallest} of 100 clients have data.min_examples=10 rows" in note for note in summary.notes)
    assert not deal(content, num_clients=100)[1].notes
    assert not deal(content, partition="dirichlet", num_clients=3, dirichlet_alpha=100.0)[1].notes


def test_answers_to_one_prompt_stay_on_one_side_whatever_the_partition():
    content = [
        Row((Example(f"question {n % 40}", "", (f"answer {n}",)),), label="ab"[n % 2], client="xy"[n % 2])
        for n in range(400)
    ]
    for options in ({}, {"partition": "dirichlet", "num_clients": 3}, {"partition": "natural"}):
        corpus, summary = deal(content, **{"num_clients": 2, **options}, unseen_fraction=0.1)
        trained = [example for splits in corpus.clients.values() for example in splits.train]
        tested = [e for s in corpus.clients.values() for e in (*s.validation, *s.test)]
        tested += [example for splits in corpus.unseen.values() for example in splits.test]
        assert not {e.instruction for e in trained} & {e.instruction for e in tested}
        assert all(len(e.outputs) == 1 for e in trained) and all(len(e.outputs) > 1 for e in tested)
        assert len(trained) + sum(len(e.outputs) for e in tested) == 400 and summary.num_repeated == 360


def test_rows_of_one_prompt_are_told_that_no_fraction_helps_and_what_does():
    same = [Row((Example("q", "", (f"a{n}",)),), label="x", client=f"o{n % 2}") for n in range(40)]
    for fraction in (0.1, 0.01, 0.9):
        with pytest.raises(InstructionDataError, match=r"all 40 share one prompt.*data.columns=\{context: COLUMN\}"):
            deal(same, unseen_fraction=fraction, num_clients=2)
    with pytest.raises(InstructionDataError, match=r"data.unseen_labels names the labels of all of them"):
        deal(same, unseen_labels=("x",), num_clients=2)
    with pytest.raises(InstructionDataError, match="unseen_owners names the owners of all of them"):
        deal(same, partition="natural", unseen_owners=("o0", "o1"))
    with pytest.raises(InstructionDataError, match="none of the 3 rows has both a prompt and an answer"):
        deal([Row(())] * 3, unseen_fraction=0.1, num_clients=2)


def test_the_fraction_that_the_answer_names_works():
    with pytest.raises(
        InstructionDataError, match=r"data.unseen_fraction=0.99 holds out all 30 prompts; .*example to 0.033"
    ):
        deal(rows(30), unseen_fraction=0.99, num_clients=2)
    _, summary = deal(rows(30), unseen_fraction=0.033, num_clients=2)
    assert (summary.num_clients, summary.num_unseen_test) == (2, 1)


def test_held_out_rows_whose_prompts_clients_train_on_are_no_unseen_task():
    shared = [Row((Example("q", "", (f"a{n}",)),), client=f"o{n % 4}") for n in range(80)]
    with pytest.raises(InstructionDataError, match="nothing is left to be scored: clients train on"):
        deal(shared, partition="natural", unseen_fraction=0.1)
    before, _ = deal(rows(200), partition="natural", unseen_labels=("b",))
    trained = before.clients["owner 1"].train[0]
    copies = [Row((trained,), label="copies", client="another")] * 3
    corpus, summary = deal([*rows(200), *copies], partition="natural", unseen_labels=("copies", "b"))
    assert list(corpus.unseen) == ["b"] and summary.num_unseen == 1
    assert summary.notes == ("Not scored (clients train on all their prompts): copies.",)


def test_owners_who_all_have_too_few_rows_are_refused_with_the_most_that_one_has():
    with pytest.raises(InstructionDataError, match=r"no owner has data.min_examples=10 rows; the largest of 5 has 8"):
        deal(rows(40), partition="natural")
