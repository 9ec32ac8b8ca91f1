"""Makes tasks that tell what kind of thing a word names."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, CATEGORY_OF, NOUNS, PLURAL_CATEGORIES
from flexlora.data.generated.recipe import Recipe, either

_LABELS = (
    ("A", "B", "C", "D"),
    ("one", "two", "three", "four"),
    ("left", "right", "up", "down"),
    ("X", "Y", "Z", "W"),
)


def classify_recipes() -> Iterator[Recipe]:
    """Yield word classification into two to four kinds, with plain and with arbitrary labels."""
    every = list(CATEGORIES)
    choices: list[tuple[str, ...]] = [
        *list(combinations(every, 2))[::3],
        *list(combinations(every, 3))[::29],
        *list(combinations(every, 4))[::161],
    ]
    for number, kinds in enumerate(choices):
        plain = number % 2 == 0
        names = kinds if plain else _LABELS[(number // 2) % len(_LABELS)][: len(kinds)]

        if plain:
            phrasings = (
                f"Is the word a name for: {either(kinds)}? Answer with one of these.",
                f"Classify the word. The classes are {either(kinds)}.",
                f"Decide which kind fits the word: {either(kinds)}.",
            )
        else:
            rules = ", ".join(
                f"{label} for {PLURAL_CATEGORIES[kind]}" for label, kind in zip(names, kinds, strict=True)
            )
            phrasings = (
                f"Label the word. Write {rules}.",
                f"Answer with {rules}.",
                f"Use these labels for the word: {rules}.",
            )
        yield Recipe(
            "word_class",
            "Word Classification",
            " / ".join(f"{k}={n}" for k, n in zip(kinds, names, strict=True)),
            phrasings,
            partial(_kind_of_word, kinds=kinds, names=names),
        )


def _kind_of_word(rng: Random, *, kinds: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, str]:
    place = rng.randrange(len(kinds))
    return rng.choice(CATEGORIES[kinds[place]]), names[place]


def check_recipes() -> Iterator[Recipe]:
    """Yield checks whether a word, or both of two words, are of one kind."""
    kinds = list(CATEGORIES)
    for number, category in enumerate(kinds):
        yield Recipe(
            "word_check",
            "Answer Verification",
            f"is it a {category}",
            (
                f"Does the word belong to the {PLURAL_CATEGORIES[category]}? Answer yes or no.",
                f"Say yes if the word names a {category} and no if it does not.",
            ),
            partial(_is_one, category=category),
        )
        other = kinds[(number + 7) % len(kinds)]

        yield Recipe(
            "word_check",
            "Answer Verification",
            f"both {category}, or one {other}",
            (
                f"Two words are given. If both are {PLURAL_CATEGORIES[category]}, answer same; "
                f"if one is from the {PLURAL_CATEGORIES[other]}, answer different.",
                f"Answer same for two {PLURAL_CATEGORIES[category]}, and different if one word is from the "
                f"{PLURAL_CATEGORIES[other]}.",
            ),
            partial(_same_kind, category=category, other=other),
        )


def _is_one(rng: Random, *, category: str) -> tuple[str, str]:
    inside = rng.random() < 0.5
    noun = rng.choice(CATEGORIES[category] if inside else [n for n in NOUNS if CATEGORY_OF[n] != category])
    return noun, "yes" if inside else "no"


def _same_kind(rng: Random, *, category: str, other: str) -> tuple[str, str]:
    first = rng.choice(CATEGORIES[category])
    same = rng.random() < 0.5
    pool = [n for n in CATEGORIES[category if same else other] if n != first]
    pair = [first, rng.choice(pool)]
    rng.shuffle(pair)
    return " and ".join(pair), "same" if same else "different"
