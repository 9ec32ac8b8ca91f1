"""Makes tasks that keep or remove the words of a list, by meaning or by spelling."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, CATEGORY_OF, NOUNS, PLURAL_CATEGORIES
from flexlora.data.generated.list_steps import mixed_words
from flexlora.data.generated.recipe import Recipe

# What is done to the words that are left: part of the name, function, and two wordings.
_ENDINGS: tuple[tuple[str, Callable[[list[str]], list[str]], tuple[str, str]], ...] = (
    ("", lambda w: w, ("", "")),
    ("; reverse", lambda w: w[::-1], (" and reverse their order", ", last one first")),
    ("; first", lambda w: w[:1], (" but write only the first of them", ", then write just the first one left")),
    ("; last", lambda w: w[-1:], (" but write only the last of them", ", then write just the last one left")),
    ("; sort", sorted, (" and sort them alphabetically", ", in alphabetical order")),
)


def filter_recipes() -> Iterator[Recipe]:
    """Yield tasks that keep or remove the words of one kind."""
    for number, category in enumerate(CATEGORIES):
        many = PLURAL_CATEGORIES[category]
        for keep in (True, False):
            chosen = (_ENDINGS[0], _ENDINGS[1 + (number + keep) % 4], _ENDINGS[1 + (number + keep + 1) % 4])
            for name, end, wording in chosen:
                verb = ("Keep only", "Copy all") if keep else ("Leave out", "Remove")
                rest = "" if keep else " and write the others"
                yield Recipe(
                    "filter_kind",
                    "Word Filtering",
                    f"{'keep' if keep else 'remove'} {category}{name}",
                    (
                        f"{verb[0]} the {many} of the list{rest}{wording[0]}.",
                        f"{verb[1]} the {many} in this list of words{rest}{wording[1]}.",
                        f"You get a mixed list of words. {verb[0]} the {many}{rest}{wording[0]}.",
                    ),
                    partial(_filter_kind, category=category, keep=keep, end=end),
                )


def _filter_kind(rng: Random, *, category: str, keep: bool, end: Callable[[list[str]], list[str]]) -> tuple[str, str]:
    words = mixed_words(rng, category, 1, 3) if keep else mixed_words(rng, category, 1, 2)
    left = [word for word in words if (CATEGORY_OF[word] == category) is keep]
    return ", ".join(words), ", ".join(end(left))


def filter_two_recipes() -> Iterator[Recipe]:
    """Yield tasks that keep the words of two kinds, those of one kind first."""
    for one, other in list(combinations(CATEGORIES, 2))[::9]:
        yield Recipe(
            "filter_two",
            "Word Filtering",
            f"{one} before {other}",
            (
                f"Write the {PLURAL_CATEGORIES[one]} of the list first and the {PLURAL_CATEGORIES[other]} after them. "
                f"Drop all else.",
                f"From the list, keep {PLURAL_CATEGORIES[one]} and then {PLURAL_CATEGORIES[other]}, "
                f"in this order, and nothing else.",
            ),
            partial(_filter_two, one=one, other=other),
        )


def _filter_two(rng: Random, *, one: str, other: str) -> tuple[str, str]:
    words = [rng.choice(CATEGORIES[one]), rng.choice(CATEGORIES[other]), *mixed_words(rng, one, 1, 1)[:3]]
    words = list(dict.fromkeys(words))
    rng.shuffle(words)
    order = {one: 0, other: 1}
    kept = sorted((w for w in words if CATEGORY_OF[w] in order), key=lambda w: order[CATEGORY_OF[w]])
    return ", ".join(words), ", ".join(kept)


def filter_letter_recipes() -> Iterator[Recipe]:
    """Yield tasks that keep or remove the words with one first letter."""
    initials = [letter for letter in "abcdfghlmprst" if sum(noun[0] == letter for noun in NOUNS) >= 6]

    for letter in initials:
        for keep in (True, False):
            verb = "Keep" if keep else "Remove"
            yield Recipe(
                "filter_letter",
                "Word Filtering",
                f"{verb.lower()} initial {letter}",
                (
                    f"{verb} the words that start with the letter {letter}.",
                    f"From the list of words, {verb.lower()} those whose first letter is {letter} and write "
                    + ("only these." if keep else "what is left."),
                ),
                partial(_filter_letter, letter=letter, keep=keep),
            )


def _filter_letter(rng: Random, *, letter: str, keep: bool) -> tuple[str, str]:
    inside = rng.sample([noun for noun in NOUNS if noun[0] == letter], rng.randint(1, 2))
    outside = rng.sample([noun for noun in NOUNS if noun[0] != letter], rng.randint(2, 3))
    words = inside + outside
    rng.shuffle(words)
    return ", ".join(words), ", ".join(word for word in words if (word[0] == letter) is keep)
