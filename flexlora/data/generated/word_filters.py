"""Which tasks filter, reformat and count the words of a list."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, CATEGORY_OF, NOUNS, NUMBER_WORDS, ORDINALS, PLURAL_CATEGORIES
from flexlora.data.generated.list_steps import SEPARATORS, STEPS, ListStep, draw_words, mixed_words
from flexlora.data.generated.recipe import Recipe, capitalised


def filter_recipes() -> Iterator[Recipe]:
    """Yield tasks that keep or remove the words of a list by meaning or by spelling."""
    endings: tuple[tuple[str, Callable[[list[str]], list[str]], tuple[str, str]], ...] = (
        ("", lambda w: w, ("", "")),
        ("; reverse", lambda w: w[::-1], (" and reverse their order", ", last one first")),
        ("; first", lambda w: w[:1], (" but write only the first of them", ", then write just the first one left")),
        ("; last", lambda w: w[-1:], (" but write only the last of them", ", then write just the last one left")),
        ("; sort", sorted, (" and sort them alphabetically", ", in alphabetical order")),
    )
    kinds = list(CATEGORIES)

    for number, category in enumerate(kinds):
        many = PLURAL_CATEGORIES[category]
        for keep in (True, False):
            chosen = (endings[0], endings[1 + (number + keep) % 4], endings[1 + (number + keep + 1) % 4])
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

    for one, other in list(combinations(kinds, 2))[::9]:
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


def _filter_kind(rng: Random, *, category: str, keep: bool, end: Callable[[list[str]], list[str]]) -> tuple[str, str]:
    words = mixed_words(rng, category, 1, 3) if keep else mixed_words(rng, category, 1, 2)
    left = [word for word in words if (CATEGORY_OF[word] == category) is keep]
    return ", ".join(words), ", ".join(end(left))


def _filter_two(rng: Random, *, one: str, other: str) -> tuple[str, str]:
    words = [rng.choice(CATEGORIES[one]), rng.choice(CATEGORIES[other]), *mixed_words(rng, one, 1, 1)[:3]]
    words = list(dict.fromkeys(words))
    rng.shuffle(words)
    order = {one: 0, other: 1}
    kept = sorted((w for w in words if CATEGORY_OF[w] in order), key=lambda w: order[CATEGORY_OF[w]])
    return ", ".join(words), ", ".join(kept)


def _filter_letter(rng: Random, *, letter: str, keep: bool) -> tuple[str, str]:
    inside = rng.sample([noun for noun in NOUNS if noun[0] == letter], rng.randint(1, 2))
    outside = rng.sample([noun for noun in NOUNS if noun[0] != letter], rng.randint(2, 3))
    words = inside + outside
    rng.shuffle(words)
    return ", ".join(words), ", ".join(word for word in words if (word[0] == letter) is keep)


def format_recipes() -> Iterator[Recipe]:
    """Yield tasks that write the same words in another layout."""
    layouts: dict[str, tuple[str, Callable[[list[str]], str]]] = {
        "numbers": (
            "number the words as in 1. apple 2. pear",
            lambda w: " ".join(f"{i}. {x}" for i, x in enumerate(w, 1)),
        ),
        "brackets": ("put square brackets around the list", lambda w: "[" + ", ".join(w) + "]"),
        "quotes": ("put every word in double quotes", lambda w: ", ".join(f'"{x}"' for x in w)),
        "stars": ("put a star before every word", lambda w: " ".join(f"* {x}" for x in w)),
        "and": (
            "write it as a phrase with the word and before the last",
            lambda w: ", ".join(w[:-1]) + " and " + w[-1],
        ),
        "or": ("join all words with the word or", lambda w: " or ".join(w)),
        "then": ("join all words with the word then", lambda w: " then ".join(w)),
        "the": ("write the word the before every word", lambda w: ", ".join(f"the {x}" for x in w)),
        "my": ("write the word my before every word", lambda w: ", ".join(f"my {x}" for x in w)),
        "sentence": (
            "write the sentence that says you see them",
            lambda w: "I see " + ", ".join(w[:-1]) + " and " + w[-1] + ".",
        ),
        "basket": (
            "say in a sentence that they are in the basket",
            lambda w: "The " + ", the ".join(w[:-1]) + " and the " + w[-1] + " are in the basket.",
        ),
        "count": (
            "write how many words there are, a colon and the words",
            lambda w: f"{NUMBER_WORDS[len(w)]}: " + ", ".join(w),
        ),
        "capitals": ("start every word with a capital letter", lambda w: ", ".join(map(capitalised, w))),
        "ordinals": (
            "write first, second and so on before the words",
            lambda w: ", ".join(f"{o} {x}" for o, x in zip(ORDINALS, w, strict=False)),
        ),
    }
    layouts |= {name: (f"separate the words by {name}", lambda w, s=s: s.join(w)) for name, s in SEPARATORS.items()}

    for number, (target, (wording, write)) in enumerate(layouts.items()):
        sources = [item for item in SEPARATORS.items() if item[0] != target]
        for name, separator in (sources[number % 3], sources[3 + number % 2], sources[5 + number % 2]):
            yield Recipe(
                "format",
                "Text Formatting",
                f"{name} to {target}",
                (
                    f"The words are separated by {name}. {capitalised(wording)}.",
                    f"Change the layout of a list with {name}: {wording}.",
                    f"Rewrite the list, in which {name} stand between the words, so that you {wording}.",
                ),
                partial(_change_layout, separator=separator, write=write),
            )
        for step in (STEPS[0], STEPS[(number * 5 + 2) % len(STEPS)]):
            if step.name.startswith(("first", "keep", "every")) or (target == "commas" and step.name == "reverse"):
                continue

            yield Recipe(
                "format_compose",
                "Text Formatting",
                f"{step.name}; to {target}",
                (
                    f"First {step.wordings[0]}. Then {wording}.",
                    f"{capitalised(step.wordings[1])}, and after that {wording}.",
                ),
                partial(_step_and_layout, step=step, write=write),
            )


def _change_layout(rng: Random, *, separator: str, write: Callable[[list[str]], str]) -> tuple[str, str]:
    words = draw_words(rng, 3, 4)
    return separator.join(words), write(words)


def _step_and_layout(rng: Random, *, step: ListStep, write: Callable[[list[str]], str]) -> tuple[str, str]:
    words = draw_words(rng, 3, 4)
    return ", ".join(words), write(step.apply(words))


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
