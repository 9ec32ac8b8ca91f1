"""Makes tasks that are about the letters of words."""

from collections.abc import Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, NOUNS, NUMBER_WORDS, PLURAL_CATEGORIES
from flexlora.data.generated.recipe import FEWEST_INPUTS, Recipe


def spelling_recipes() -> Iterator[Recipe]:
    """Yield tasks on the letters of words: initials, acronyms, alphabetical comparison."""
    for category, nouns in CATEGORIES.items():
        many = PLURAL_CATEGORIES[category]
        if len(nouns) >= FEWEST_INPUTS:
            yield Recipe(
                "spelling",
                "Linguistic Probing",
                f"first letter; {category}",
                (
                    f"Write the first letter of the word. All words are {many}.",
                    f"With which letter does this {category} start?",
                ),
                partial(_first_letter, nouns=nouns),
            )
        yield Recipe(
            "spelling",
            "Linguistic Probing",
            f"initials; {category}",
            (f"Write the first letters of the {many}, with spaces.", f"Shorten the row of {many} to their initials."),
            partial(_initials, nouns=nouns),
        )
        yield Recipe(
            "spelling",
            "Linguistic Probing",
            f"earlier; {category}",
            (
                f"Which of the two {many} comes first in the alphabet?",
                f"Write the {category} that is first alphabetically.",
            ),
            partial(_earlier, nouns=nouns),
        )

    for count in (2, 3):
        yield Recipe(
            "spelling",
            "Linguistic Probing",
            f"stutter; {count}",
            (
                f"Stutter {NUMBER_WORDS[count]} words: before each write its first letter and a dash.",
                f"Put first letter and dash before each of the {NUMBER_WORDS[count]} words.",
            ),
            partial(_stutter, count=count),
        )


def _initial(word: str) -> str:
    return word[0]


def _first_letter(rng: Random, *, nouns: tuple[str, ...]) -> tuple[str, str]:
    word = rng.choice(nouns)
    return word, _initial(word)


def _initials(rng: Random, *, nouns: tuple[str, ...]) -> tuple[str, str]:
    words = rng.sample(nouns, rng.randint(2, 4))
    return " ".join(words), " ".join(map(_initial, words))


def _earlier(rng: Random, *, nouns: tuple[str, ...]) -> tuple[str, str]:
    one, other = rng.sample(nouns, 2)
    return f"{one} or {other}", min(one, other)


def _stutter(rng: Random, *, count: int) -> tuple[str, str]:
    words = rng.sample(NOUNS, count)
    return " ".join(words), " ".join(f"{_initial(word)}-{word}" for word in words)
