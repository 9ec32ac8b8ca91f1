"""Defines what can be done to a list of words: the primitives that the list tasks share."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, CATEGORY_OF, NOUNS


@dataclass(frozen=True)
class ListStep:
    """A function from list to list and two ways to ask for it, both in the imperative."""

    name: str
    wordings: tuple[str, str]
    apply: Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class Pick:
    """A function from list to one word and two ways to name that word."""

    name: str
    wordings: tuple[str, str]
    apply: Callable[[list[str]], str]


def _move(words: list[str], source: int, target: int) -> list[str]:
    rest = list(words)
    word = rest.pop(source)
    rest.insert(target if target >= 0 else len(rest), word)
    return rest


def _swap(words: list[str], one: int, other: int) -> list[str]:
    swapped = list(words)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    return swapped


STEPS: tuple[ListStep, ...] = (
    ListStep("reverse", ("reverse the list", "put the words in the opposite order"), lambda w: w[::-1]),
    ListStep("sort", ("sort the words alphabetically", "put the words in alphabetical order"), sorted),
    ListStep(
        "swap ends", ("swap the first and the last word", "exchange the words at both ends"), lambda w: _swap(w, 0, -1)
    ),
    ListStep(
        "swap front", ("swap the first two words", "exchange the first and the second word"), lambda w: _swap(w, 0, 1)
    ),
    ListStep("swap back", ("swap the last two words", "exchange the final two words"), lambda w: _swap(w, -1, -2)),
    ListStep("rotate left", ("move the first word to the end", "put the first word last"), lambda w: _move(w, 0, -1)),
    ListStep("rotate right", ("move the last word to the front", "put the last word first"), lambda w: _move(w, -1, 0)),
    ListStep("drop first", ("remove the first word", "delete the word at the start"), lambda w: w[1:]),
    ListStep("drop last", ("remove the last word", "delete the word at the end"), lambda w: w[:-1]),
    ListStep("drop second", ("remove the second word", "delete the word in second place"), lambda w: w[:1] + w[2:]),
    ListStep("keep two", ("keep only the first two words", "drop all but the first two words"), lambda w: w[:2]),
    ListStep("keep last two", ("keep only the last two words", "drop all but the final two words"), lambda w: w[-2:]),
    ListStep(
        "keep ends", ("keep only the first and last word", "drop everything between the ends"), lambda w: [w[0], w[-1]]
    ),
    ListStep(
        "every other", ("keep every other word, from the first", "keep the words in odd places"), lambda w: w[::2]
    ),
    ListStep("double first", ("write the first word twice", "repeat the first word"), lambda w: [w[0], *w]),
    ListStep("double last", ("write the last word twice", "repeat the last word"), lambda w: [*w, w[-1]]),
    ListStep(
        "double all", ("write every word twice", "repeat each word"), lambda w: [x for word in w for x in (word, word)]
    ),
    ListStep(
        "first to all",
        ("replace every word by the first one", "write the first word in every place"),
        lambda w: [w[0]] * len(w),
    ),
)

PICKS: tuple[Pick, ...] = (
    Pick("first", ("the first word", "the word at the start"), lambda w: w[0]),
    Pick("second", ("the second word", "the word in second place"), lambda w: w[1]),
    Pick("third", ("the third word", "the word in third place"), lambda w: w[2]),
    Pick("last", ("the last word", "the word at the end"), lambda w: w[-1]),
    Pick("last but one", ("the last word but one", "the word just before the last"), lambda w: w[-2]),
    Pick("alphabetical first", ("the word that comes first in the alphabet", "the alphabetically first word"), min),
    Pick("alphabetical last", ("the word that comes last in the alphabet", "the alphabetically last word"), max),
)

SEPARATORS: dict[str, str] = {
    "commas": ", ",
    "spaces": " ",
    "slashes": " / ",
    "dashes": " - ",
    "semicolons": "; ",
    "bars": " | ",
    "plus signs": " + ",
    "arrows": " > ",
}


def draw_words(rng: Random, low: int, high: int, category: str | None = None) -> list[str]:
    """Draw different nouns, of one category or of all."""
    return rng.sample(CATEGORIES[category] if category else NOUNS, rng.randint(low, high))


def mixed_words(rng: Random, category: str, low: int, high: int) -> list[str]:
    """Draw a mixed list of 3 to 6 nouns with `low` to `high` of the category among them."""
    inside = rng.sample(CATEGORIES[category], rng.randint(low, high))
    outside = [noun for noun in rng.sample(NOUNS, 12) if CATEGORY_OF[noun] != category][: rng.randint(2, 3)]
    words = inside + outside
    rng.shuffle(words)
    return words
