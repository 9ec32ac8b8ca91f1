"""Puts the tasks of the embedded corpus together, numbers them and says which the base model may be pretrained on.

    task = all_tasks()[0]
    task.instances(num=10, seed=0)

The order of recipes is part of the corpus: tasks are numbered in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

from flexlora.data.generated import (
    arithmetic,
    blanks,
    facts,
    grammar,
    lookups,
    messages,
    passages,
    sentences,
    sequences,
    spelling,
    tables,
    translations,
    word_counts,
    word_edits,
    word_filters,
    word_layouts,
    word_lists,
    word_meaning,
)
from flexlora.data.generated.lexicon import LANGUAGES
from flexlora.data.generated.recipe import Recipe

if TYPE_CHECKING:
    from _typeshed import SupportsLenAndGetItem

Split = Literal["pretrain", "federated"]
Item = TypeVar("Item")

# Dictionaries of these languages are for the pretrained base; all other languages are new to it.
_PRETRAIN_LANGUAGES = frozenset(LANGUAGES[-2:])
_PRETRAIN_PERCENT = 26


class Instance(TypedDict):
    """One example of a task; ``output`` lists the accepted answers."""

    id: str
    input: str
    output: list[str]


class _QuickRandom(Random):
    """Draws the same numbers as ``Random``, with fewer calls for what recipes do most: choosing one of several."""

    def choice(self, seq: "SupportsLenAndGetItem[Item]") -> Item:
        """Return what ``Random.choice`` does."""
        size = len(seq)
        num_bits, draw = size.bit_length(), self.getrandbits
        number = draw(num_bits)
        while number >= size:
            number = draw(num_bits)
        return seq[number]


@dataclass(frozen=True)
class GeneratedTask:
    """One task of the embedded corpus.

    Attributes:
        task_id: Stable name such as "list_order-0012".
        category: The family in words.
        definition: The task in natural language.
    """

    task_id: str
    category: str
    definition: str
    recipe: Recipe

    def draw(self, num: int, seed: int) -> dict[str, str]:
        """Return up to ``num`` different inputs with their answers, a function of the seed and the task alone.

        A task over a small table of words has fewer different inputs than ``num`` may ask for; it then returns all of
        them. A smaller ``num`` gives the first of what a larger one gives.
        """
        rng, make = _QuickRandom(f"{seed}/{self.recipe.family}/{self.recipe.computes}"), self.recipe.make
        drawn: dict[str, str] = {}
        misses = 0
        # 200 draws in a row without a new input: the task has (almost surely) no more of them.
        while len(drawn) < num and misses < 200:
            text, answer = make(rng)
            if text in drawn:
                misses += 1
            else:
                drawn[text] = answer
                misses = 0
        return drawn

    def instances(self, num: int, seed: int) -> list[Instance]:
        """Return what ``draw`` does in the form of Natural Instructions."""
        return [
            Instance(id=f"{self.task_id}-{number:04d}", input=text, output=[answer])
            for number, (text, answer) in enumerate(self.draw(num, seed).items())
        ]


def _recipes() -> Iterator[Recipe]:
    yield from word_lists.order_recipes()
    yield from word_lists.select_recipes()
    yield from word_filters.filter_recipes()
    yield from word_filters.filter_two_recipes()
    yield from word_filters.filter_letter_recipes()
    yield from word_layouts.format_recipes()
    yield from word_counts.count_recipes()
    yield from facts.fact_recipes()
    yield from facts.two_fact_recipes()
    yield from word_meaning.classify_recipes()
    yield from word_meaning.check_recipes()
    yield from translations.translation_recipes()
    yield from sentences.rewrite_recipes()
    yield from word_edits.edit_recipes()
    yield from grammar.grammar_recipes()
    yield from blanks.complete_recipes()
    yield from passages.comprehension_recipes()
    yield from passages.extraction_recipes()
    yield from tables.report_recipes()
    yield from passages.question_recipes()
    yield from messages.review_recipes()
    yield from messages.topic_recipes()
    yield from passages.title_recipes()
    yield from passages.verify_recipes()
    yield from lookups.lookup_recipes()
    yield from messages.dialogue_recipes()
    yield from sequences.pattern_recipes()
    yield from sequences.row_recipes()
    yield from arithmetic.number_recipes()
    yield from arithmetic.story_recipes()
    yield from arithmetic.number_form_recipes()
    yield from arithmetic.compare_recipes()
    yield from spelling.spelling_recipes()


@lru_cache(maxsize=4)
def all_tasks(seed: int = 0) -> tuple[GeneratedTask, ...]:
    """Return every task, always in the same order; the seed only chooses between the phrasings of a definition."""
    numbers: dict[str, int] = {}
    tasks: list[GeneratedTask] = []
    for recipe in _recipes():
        number = numbers.get(recipe.family, 0)
        numbers[recipe.family] = number + 1
        definition = Random(f"phrasing {seed}/{recipe.family}/{recipe.computes}").choice(recipe.phrasings)
        tasks.append(GeneratedTask(f"{recipe.family}-{number:04d}", recipe.category, definition, recipe))
    return tuple(tasks)


def split_of(task: GeneratedTask) -> Split:
    """Return whether a task may be pretrained on ("pretrain") or is for clients and their evaluation ("federated").

    The split follows from what the task computes, whatever the seed.
    """
    computes = task.recipe.computes
    if task.recipe.family == "translate":
        return "pretrain" if computes.split()[0] in _PRETRAIN_LANGUAGES else "federated"
    digest = blake2b(f"{task.recipe.family}/{computes}".encode(), digest_size=4).digest()
    return "pretrain" if int.from_bytes(digest, "big") % 100 < _PRETRAIN_PERCENT else "federated"


def as_natural_instructions(task: GeneratedTask, num: int, seed: int) -> dict[str, list[str] | list[Instance]]:
    """Return the task as one file of Natural Instructions holds it."""
    return {
        "Definition": [task.definition],
        "Categories": [task.category],
        "Positive Examples": [],
        "Negative Examples": [],
        "Instances": task.instances(num, seed),
    }
