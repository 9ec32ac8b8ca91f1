"""Makes tasks that count the words of a list."""

from collections.abc import Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, CATEGORY_OF, NUMBER_WORDS, PLURAL_CATEGORIES
from flexlora.data.generated.list_steps import draw_words, mixed_words
from flexlora.data.generated.recipe import Recipe


def count_recipes() -> Iterator[Recipe]:
    """Yield counting tasks: answers are number words or digits."""

    for style in ("word", "digit"):
        yield Recipe(
            "count",
            "Counting",
            f"all words; {style}",
            (
                f"How many words are in the list? Answer with a {style}.",
                f"Count the words and write the number as a {style}.",
            ),
            partial(_count_all, style=style),
        )
        for number, category in enumerate(CATEGORIES):
            if number % 2 == (style == "word"):
                continue

            yield Recipe(
                "count",
                "Counting",
                f"{category}; {style}",
                (
                    f"How many {PLURAL_CATEGORIES[category]} are in the list? Answer with a {style}.",
                    f"Count the {PLURAL_CATEGORIES[category]} among the words. Write the number as a {style}.",
                ),
                partial(_count_kind, category=category, style=style),
            )

    for category in list(CATEGORIES)[::2]:
        yield Recipe(
            "count",
            "Counting",
            f"repeats of a {category}",
            (
                f"How often does the {category} before the colon occur in the list after it? Answer with a word.",
                f"A {category}, a colon and a list follow. Count how many times the first word appears in the list.",
            ),
            partial(_count_repeats, category=category),
        )


def _count_all(rng: Random, *, style: str) -> tuple[str, str]:
    words = draw_words(rng, 1, 7)
    return ", ".join(words), NUMBER_WORDS[len(words)] if style == "word" else str(len(words))


def _count_kind(rng: Random, *, category: str, style: str) -> tuple[str, str]:
    words = mixed_words(rng, category, 0, 4)
    count = sum(CATEGORY_OF[word] == category for word in words)
    return ", ".join(words), NUMBER_WORDS[count] if style == "word" else str(count)


def _count_repeats(rng: Random, *, category: str) -> tuple[str, str]:
    target, *others = rng.sample(CATEGORIES[category], 3)
    count = rng.randint(1, 4)
    words = [target] * count + others
    rng.shuffle(words)
    return f"{target}: " + ", ".join(words), NUMBER_WORDS[count]
