"""The generated corpus: enough different tasks, right answers, and a split that nothing crosses.

Expected answers are recomputed here from the wording of the input alone, with word tables written out again.
"""

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.generated.lexicon import CATEGORIES, LANGUAGES, NOUNS, TRANSLATABLE, invented_words
from flexlora.data.generated.recipe import FEWEST_INPUTS
from flexlora.data.generated.tasks import GeneratedTask, _QuickRandom, all_tasks, as_natural_instructions, split_of
from flexlora.data.natural_instructions import parse_task


@cache
def behaviour(task: GeneratedTask) -> tuple[tuple[str, str], ...]:
    return tuple((item["input"], item["output"][0]) for item in task.instances(24, seed=7))


@cache
def task_named(family: str, computes: str) -> GeneratedTask:
    return next(t for t in all_tasks() if (t.recipe.family, t.recipe.computes) == (family, computes))


def test_there_are_at_least_2300_tasks_in_at_least_14_families() -> None:
    tasks = all_tasks()
    assert len(tasks) >= 2300
    assert len({task.category for task in tasks}) >= 14
    assert len({task.task_id for task in tasks}) == len(tasks)


def test_no_two_tasks_have_the_same_recipe_or_definition() -> None:
    assert max(Counter((t.recipe.family, t.recipe.computes) for t in all_tasks()).values()) == 1
    assert max(Counter(t.definition for t in all_tasks()).values()) == 1


def test_no_two_tasks_compute_the_same() -> None:
    # Each task is asked about the inputs of every other task only where both draw them: two tasks that agree on all
    # shared inputs and share most of them would be one task in two wordings.
    answers: dict[str, dict[int, str]] = {}
    for number, task in enumerate(all_tasks()):
        for text, answer in behaviour(task):
            answers.setdefault(text, {})[number] = answer
    shared: Counter[tuple[int, int]] = Counter()
    different: set[tuple[int, int]] = set()
    for by_task in answers.values():
        numbers = sorted(by_task)
        if len(numbers) > 12:  # a single word that many tasks are about
            continue
        for place, one in enumerate(numbers):
            for other in numbers[place + 1 :]:
                shared[one, other] += 1
                if by_task[one] != by_task[other]:
                    different.add((one, other))
    tasks = all_tasks()
    same = [
        (tasks[one].task_id, tasks[other].task_id)
        for (one, other), count in shared.items()
        if count >= 10 and (one, other) not in different
    ]
    assert same == []


def test_the_split_follows_from_the_task_and_is_large_enough_on_both_sides() -> None:
    counts = Counter(split_of(task) for task in all_tasks())
    assert counts["federated"] >= 1700
    assert 0.2 < counts["pretrain"] / counts.total() < 0.3
    assert [split_of(task) for task in all_tasks(seed=3)] == [split_of(task) for task in all_tasks(seed=0)]


def test_the_splits_share_no_definition_and_no_behaviour() -> None:
    sides: dict[str, set[object]] = {"pretrain": set(), "federated": set()}
    for task in all_tasks():
        sides[split_of(task)] |= {task.definition, behaviour(task)}
    assert not sides["pretrain"] & sides["federated"]


def test_languages_of_the_pretrain_split_occur_in_no_federated_task() -> None:
    languages = {"pretrain": set[str](), "federated": set[str]()}
    for task in all_tasks():
        languages[split_of(task)] |= {name for name in LANGUAGES if name in task.definition}
    assert len(languages["pretrain"]) == 2
    assert languages["federated"] == set(LANGUAGES) - languages["pretrain"]


def test_every_task_has_short_prompts_and_enough_different_inputs() -> None:
    for task in all_tasks():
        items = task.instances(16, seed=1)
        assert len(items) >= FEWEST_INPUTS, task
        assert len({item["input"] for item in items}) == len(items)
        assert len(task.definition.split()) <= 35, task
        for item in items:
            assert 0 < len(item["input"].split()) <= 30, (task, item)
            assert 0 < len(item["output"][0].split()) <= 21, (task, item)
            assert "{" not in item["input"] + item["output"][0], (task, item)


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 2299), seed=st.integers(0, 2**32))
def test_instances_are_a_function_of_the_seed_and_the_task(place: int, seed: int) -> None:
    task = all_tasks()[place]
    assert task.instances(12, seed) == task.instances(12, seed)
    assert task.instances(5, seed) == task.instances(12, seed)[:5]


def test_quick_choices_are_those_of_the_standard_generator() -> None:
    quick, standard = _QuickRandom("seed"), Random("seed")
    for size in [*range(1, 40), 1000]:
        assert [quick.choice(range(size)) for _ in range(9)] == [standard.choice(range(size)) for _ in range(9)]
    assert quick.random() == standard.random()


def test_texts_are_as_they_are_read_from_files_of_the_same_tasks() -> None:
    for task in all_tasks()[::9]:
        parsed = parse_task(task.task_id, as_natural_instructions(task, num=30, seed=0))
        drawn = task.draw(30, seed=0)
        assert [(e.input, *e.outputs) for e in parsed.examples] == list(drawn.items())
        assert (parsed.definition, parsed.category) == (task.definition, task.category)


def test_another_seed_gives_other_instances_and_other_wordings() -> None:
    task = task_named("list_order", "reverse; words; commas")
    assert task.instances(5, 0) != task.instances(5, 1)
    differing = sum(one.definition != other.definition for one, other in zip(all_tasks(0), all_tasks(1), strict=True))
    assert differing > 500


def test_natural_instructions_form_has_the_published_keys() -> None:
    task = all_tasks()[40]
    written = json.loads(json.dumps(as_natural_instructions(task, num=3, seed=0)))
    assert list(written) == ["Definition", "Categories", "Positive Examples", "Negative Examples", "Instances"]
    assert written["Definition"] == [task.definition]
    assert written["Categories"] == [task.category]
    assert len(written["Instances"]) == 3
    for item in written["Instances"]:
        assert set(item) == {"id", "input", "output"}
        assert isinstance(item["output"], list)


def test_every_noun_has_one_category_and_every_dictionary_is_one_to_one() -> None:
    assert len(NOUNS) == sum(map(len, CATEGORIES.values()))
    assert sum(sum(noun in nouns for nouns in CATEGORIES.values()) for noun in NOUNS) == len(NOUNS)
    for language in LANGUAGES:
        words = invented_words(language)
        assert len(set(words.values())) == len(words)
        assert not set(words.values()) & set(NOUNS)
        assert all(noun in words for name in TRANSLATABLE for noun in CATEGORIES[name])


def _reverse_and_drop_first(text: str) -> str:
    words = text.split(", ")
    words.reverse()
    del words[0]
    return ", ".join(words)


_ANIMALS = set(
    "cat dog horse cow sheep goat pig rabbit mouse lion tiger bear wolf fox deer camel monkey elephant".split()
)

_ORACLES: list[tuple[str, str, Callable[[str], str]]] = [
    ("list_order", "reverse; words; commas", lambda x: ", ".join(reversed(x.split(", ")))),
    ("list_order", "sort; words; commas", lambda x: ", ".join(sorted(x.split(", ")))),
    ("list_order", "rotate left; words; commas", lambda x: x.partition(", ")[2] + ", " + x.partition(", ")[0]),
    ("list_compose", "reverse, then drop first", _reverse_and_drop_first),
    ("select", "last; commas", lambda x: x.rpartition(", ")[2]),
    ("select", "alphabetical first; commas", lambda x: sorted(x.split(", "))[0]),
    ("filter_kind", "keep animal", lambda x: ", ".join(w for w in x.split(", ") if w in _ANIMALS)),
    ("filter_kind", "remove animal", lambda x: ", ".join(w for w in x.split(", ") if w not in _ANIMALS)),
    ("select_kind", "the one animal", lambda x: next(w for w in x.split(", ") if w in _ANIMALS)),
    ("filter_letter", "keep initial c", lambda x: ", ".join(w for w in x.split(", ") if w.startswith("c"))),
    ("count", "all words; digit", lambda x: str(x.count(",") + 1)),
    ("edit", "reverse", lambda x: " ".join(x.split()[::-1])),
    ("edit", "add today", lambda x: x + " today"),
    ("rewrite", "present to headline", lambda x: x.replace(" the", "", 1).rstrip(".")),
    ("rewrite", "future to can", lambda x: x.replace(" will ", " can ")),
    ("correct", "full stop", lambda x: x + "."),
    ("extract", "person; city", lambda x: x.split(" from ")[1].split()[0]),
    ("keywords", "purchase; name and colour", lambda x: f"#{x.split()[2]} #{x.split()[5]}"),
    ("arithmetic", "sum; digits to digits", lambda x: str(sum(map(int, x.split(" plus "))))),
    ("arithmetic", "larger; digits to digits", lambda x: max(x.split(" or "), key=int)),
    ("pattern", "ABAB; animal", lambda x: " ".join(x.split()[:2])),
    ("spelling", "initials; fruit", lambda x: " ".join(w[0] for w in x.split())),
    ("lookup", "name to city; keys", lambda x: ", ".join(pair.split(":")[0] for pair in x.split(", "))),
    (
        "verify_list",
        "contains the animal",
        lambda x: "yes" if x.split(": ")[0] in x.split(": ")[1].split(", ") else "no",
    ),
    ("word_check", "is it a animal", lambda x: "yes" if x in _ANIMALS else "no"),
    ("format", "dashes to commas", lambda x: x.replace(" - ", ", ")),
]


@pytest.mark.parametrize(("family", "computes", "oracle"), _ORACLES, ids=[f"{f}: {c}" for f, c, _ in _ORACLES])
def test_answers_agree_with_an_independent_oracle(family: str, computes: str, oracle: Callable[[str], str]) -> None:
    for item in task_named(family, computes).instances(30, seed=11):
        assert item["output"] == [oracle(item["input"])]


def test_translation_answers_come_back_by_the_reverse_task() -> None:
    there = {x: y for x, y in behaviour(task_named("translate", "Zorian animal; word"))}
    back = {x: y for x, y in behaviour(task_named("translate", "Zorian animal; back"))}
    assert all(back[word] == english for english, word in there.items() if word in back)
    assert any(word in back for word in there.values())
