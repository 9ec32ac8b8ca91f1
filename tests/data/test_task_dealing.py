"""Tasks dealt to clients: splits inside a task, held-out tasks, and what is left out."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.examples import ExampleSplits
from flexlora.data.natural_instructions import NaturalInstructionsError, parse_task, read_tasks
from flexlora.data.partition import train_validation_test
from flexlora.data.task_dealing import TaskDealing, deal_tasks, subsample
from flexlora.data.task_hold_out import HoldOut
from flexlora.federation.streams import stream

SHARED = Path(os.environ.get("FLEXLORA_SHARED", Path(__file__).parents[2].parent / "shared"))


def fields(num=40, category="Reversal", definition="Reverse the text.", **more):
    instances = [{"id": f"i{n}", "input": f"text {n}", "output": [f"{n} txet"]} for n in range(num)]
    return {"Definition": [definition], "Categories": [category], "Instances": instances, **more}


def tasks(num_tasks=12, num_categories=3, num=40):
    return [
        parse_task(f"task{n:03d}", fields(num, f"category {n % num_categories}", f"Do thing {n}."))
        for n in range(num_tasks)
    ]


def inputs(examples):
    return [example.input for example in examples]


def deal(tasks, seed, **options):
    return deal_tasks(tasks, seed, TaskDealing(**options))


def split_task(task, seed):
    """Return what a client that has the task alone must have."""
    parts = train_validation_test(len(task.examples), stream(seed, "task-split", task.task_id))
    train, validation, test = (tuple(task.examples[index] for index in part) for part in parts)
    return ExampleSplits(train, validation, test, task.category)


@given(num=st.integers(10, 130), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_split_is_disjoint_complete_and_four_fifths_for_training(num, seed):
    task = parse_task("t", fields(num))
    splits = deal([task], seed)[0].clients["t"]
    parts = [inputs(splits.train), inputs(splits.validation), inputs(splits.test)]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(inputs(task.examples))
    assert len(parts[1]) == len(parts[2]) == round(num / 10)


def test_a_split_depends_on_seed_and_task_and_on_no_other_task():
    together, _ = deal(tasks(12), 5)
    alone, _ = deal(tasks(12)[3:4], 5)
    assert together.clients["task003"] == alone.clients["task003"] == split_task(tasks(12)[3], 5)
    assert split_task(tasks(12)[3], 6) != split_task(tasks(12)[3], 5)
    assert inputs(together.clients["task003"].test) != inputs(together.clients["task004"].test)


def test_the_order_of_tasks_changes_nothing():
    options = {"hold_out": HoldOut(num_tasks=3), "num_clients": 5, "fraction": 0.5}
    assert deal(tasks(), 1, **options) == deal(reversed(tasks()), 1, **options)
    assert deal(tasks(), 1, **options) != deal(tasks(), 2, **options)


def test_subsampling_keeps_the_share_asked_for_up_to_the_limit():
    task = tasks(1, num=400)[0]
    tenth = subsample(task, 0, 0.1)
    assert len(tenth.examples) == 40
    assert set(tenth.examples) < set(task.examples)
    assert subsample(task, 0, 0.1) == tenth != subsample(task, 1, 0.1)
    assert len(subsample(task, 0, 0.1, 15).examples) == 15
    assert subsample(task, 0) is task


def test_unseen_tasks_are_those_named_those_of_a_category_and_a_number_more():
    hold_out = HoldOut(tasks=("task000.json", "task001"), categories=("category 2",), num_tasks=2)
    corpus, summary = deal(tasks(12, 3), 0, hold_out=hold_out)
    named = {"task000", "task001"} | {f"task{n:03d}" for n in range(2, 12, 3)}
    assert named < set(corpus.unseen)
    assert len(corpus.unseen) == len(named) + 2 == summary.num_unseen
    assert not set(corpus.unseen) & set(corpus.clients)
    assert len(corpus.unseen) + len(corpus.clients) == 12


def test_everything_of_an_unseen_task_is_scored_and_nothing_trained():
    corpus, summary = deal(tasks(), 0, hold_out=HoldOut(num_tasks=2))
    for splits in corpus.unseen.values():
        assert (splits.train, splits.validation) == ((), ())
        assert len(splits.test) == 40
    assert summary.num_unseen_test == 80
    assert (summary.num_train, summary.num_validation, summary.num_test) == (320, 40, 40)


def test_tasks_seen_in_pretraining_are_left_out_counted_and_reported_when_asked_for():
    seen = {"Do thing 1.", "Do thing 4."}

    def exclude(definition, texts):
        assert len(list(texts)) == 40
        return definition in seen

    hold_out = HoldOut(tasks=("task001", "task002"))
    corpus, summary = deal(tasks(), 0, hold_out=hold_out, exclude=exclude, fraction=0.5)
    assert not {"task001", "task004"} & (set(corpus.clients) | set(corpus.unseen))
    assert summary.num_seen_in_pretraining == 2
    assert summary.unseen_left_out == ("task001",)


def test_small_tasks_and_other_languages_are_left_out_and_counted():
    mixed = [
        *tasks(4),
        parse_task("small", fields(9)),
        parse_task("german", fields(definition="G", Input_language=["German"], Output_language=["English"])),
        parse_task("english", fields(definition="E", Input_language=["English"], Output_language=["English"])),
    ]
    corpus, summary = deal(mixed, 0, languages=["English"])
    assert set(corpus.clients) == {"task000", "task001", "task002", "task003", "english"}
    assert (summary.num_too_small, summary.num_other_language, summary.num_tasks) == (1, 1, 7)


def test_a_language_that_no_task_names_is_refused_where_tasks_name_any():
    named = [parse_task("a", fields(Input_language=["English"])), parse_task("b", fields(definition="B"))]
    with pytest.raises(NaturalInstructionsError, match=r"data.languages .* 'english' is near 'English'"):
        deal(named, 0, languages=["english"])
    corpus, _ = deal(named[1:], 0, languages=["english"])
    assert set(corpus.clients) == {"b"}


def test_the_number_of_clients_can_be_limited():
    corpus, summary = deal(tasks(), 0, hold_out=HoldOut(num_tasks=2), num_clients=4)
    assert len(corpus.clients) == summary.num_clients == 4
    assert summary.num_not_drawn == 6


def test_a_large_task_belongs_to_several_clients_that_share_nothing():
    many = [parse_task("big", fields(55)), parse_task("small", fields(24, definition="Do it.")), *tasks(2, num=20)]
    corpus, summary = deal(many, 3, hold_out=HoldOut(tasks=("small",)), examples_per_client=20)
    assert list(corpus.clients) == ["big", "big.2", "big.3", "task000", "task001"]
    sizes = [sum(map(len, (own.train, own.validation, own.test))) for own in corpus.clients.values()]
    assert sizes == [20, 20, 15, 20, 20] and len(corpus.unseen["small"].test) == 20
    owned = [
        {e.input for part in (own.train, own.validation, own.test) for e in part} for own in corpus.clients.values()
    ]
    assert len(set.union(*owned[:3])) == 55 and summary.num_leaked == 0
    # The first client has what it would have had alone, whoever else is there.
    alone, _ = deal([parse_task("big", fields(20))], 3, examples_per_client=20)
    assert alone.clients["big"] == corpus.clients["big"]
    drawn, summary = deal(many, 3, hold_out=HoldOut(tasks=("small",)), examples_per_client=20, num_clients=2)
    assert len(drawn.clients) == 2 and summary.num_not_drawn == 3


def test_prompts_that_another_client_trains_on_leave_test_and_unseen_parts():
    # Twins: the same definition and inputs under two names; whatever one trains on must not be scored for the other.
    twins = [parse_task(name, fields(40)) for name in ("a", "b", "c")]
    corpus, summary = deal(twins, 0, hold_out=HoldOut(tasks=("c",)))
    trained = {example.input for splits in corpus.clients.values() for example in splits.train}
    scored = {e.input for s in (*corpus.clients.values(), *corpus.unseen.values()) for e in (*s.validation, *s.test)}
    assert not trained & scored
    assert summary.num_leaked > 0


def test_a_held_out_task_of_which_clients_train_on_every_prompt_is_named_and_not_scored():
    # Ten twins train on random four fifths each: the chance that one of 12 inputs is left is 12 * 0.2 ** 10.
    twins = [parse_task(f"twin{n}", fields(12)) for n in range(10)]
    held_out, other = parse_task("copy", fields(12)), parse_task("other", fields(20, definition="Do another thing."))
    corpus, summary = deal([*twins, held_out, other], 0, hold_out=HoldOut(tasks=("copy", "other")))
    assert list(corpus.unseen) == ["other"]
    assert (summary.num_unseen, summary.unseen_left_out) == (1, ("copy",))
    with pytest.raises(
        NaturalInstructionsError, match=r"nothing is left to be scored: .* every prompt of copy, held out"
    ):
        deal([*twins, held_out], 0, hold_out=HoldOut(tasks=("copy",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, "data.subsample_fraction must be above 0 and at most 1; got 0"),
        ({"min_examples": 2}, "data.min_examples must be 3 or more"),
        ({"max_examples": 5}, "data.max_examples_per_task must not be below data.min_examples=10; got 5"),
        ({"num_clients": 0}, "data.num_clients must be 1 or more"),
        ({"num_clients": 13}, "data.num_clients must be at most 12, the tasks that are left; got 13"),
        ({"hold_out": HoldOut(num_tasks=13)}, "data.num_unseen_tasks must be at most 12"),
        ({"hold_out": HoldOut(num_tasks=12)}, "no task is left to be a client"),
        ({"min_examples": 50}, "no task is left to be a client"),
        ({"min_examples": 50, "hold_out": HoldOut(tasks=("task001",))}, "none of the 1 tasks to hold out is left"),
    ],
)
def test_impossible_selections_are_refused(options, message):
    with pytest.raises(NaturalInstructionsError, match=message):
        deal(tasks(), 0, **options)


def test_two_tasks_of_one_name_are_refused():
    with pytest.raises(NaturalInstructionsError, match="'task000' occurs twice"):
        deal([*tasks(2), *tasks(1)], 0)


@pytest.mark.skipif(
    not (SHARED / "data" / "natural-instructions").is_dir(),
    reason="needs data/natural-instructions; set FLEXLORA_SHARED to the folder that holds data/",
)
def test_the_whole_converted_corpus_is_read_in_seconds():
    start = time.process_time()
    tasks = read_tasks(SHARED / "data" / "natural-instructions")
    corpus, summary = deal(tasks, 0, hold_out=HoldOut(num_tasks=64))
    assert time.process_time() - start < 10
    assert (summary.num_tasks, summary.num_unseen) == (1523, 64)
    assert len(corpus.clients) > 1400
    assert len({splits.category for splits in corpus.unseen.values()}) == 64
