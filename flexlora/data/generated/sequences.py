"""Which tasks count on, calculate, compare and continue patterns."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import (
    CATEGORIES,
    DAYS,
    MONTHS,
    NAMES,
    NOUNS,
    NUMBER_WORDS,
    OBJECTS,
    PLURAL_CATEGORIES,
)
from flexlora.data.generated.recipe import FEWEST_INPUTS, Recipe

_LETTERS: tuple[str, ...] = tuple("abcdefghijklmnopqrstuvwxyz")


def pattern_recipes() -> Iterator[Recipe]:
    """Yield continuations of patterns of words, numbers, days, months and letters."""
    shapes: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
        "ABAB": (2, (0, 1, 0, 1), (0, 1)),
        "AAB": (2, (0, 0, 1, 0, 0), (1,)),
        "ABB": (2, (0, 1, 1, 0), (1, 1)),
        "ABC": (3, (0, 1, 2, 0), (1, 2)),
        "ABA mirror": (3, (0, 1, 2), (2, 1, 0)),
        "AABB": (2, (0, 0, 1, 1, 0), (0, 1, 1)),
        "ABCC": (3, (0, 1, 2, 2, 0), (1, 2, 2)),
    }

    for number, (shape, (size, shown, hidden)) in enumerate(shapes.items()):
        for category in list(CATEGORIES)[number % 4 :: 4]:
            last = {1: "one more word", 2: "two more words", 3: "three more words"}[len(hidden)]
            what = "Mirror the row of" if "mirror" in shape else f"The pattern is {shape}. Continue the row of"
            yield Recipe(
                "pattern",
                "Pattern Continuation",
                f"{shape}; {category}",
                (
                    f"{what} {PLURAL_CATEGORIES[category]} by {last}.",
                    f"{what} {PLURAL_CATEGORIES[category]}; write {last} and nothing else.",
                ),
                partial(_continue_pattern, category=category, size=size, shown=shown, hidden=hidden),
            )
    rows: dict[str, tuple[str, ...]] = {
        "day": DAYS,
        "month": MONTHS,
        "letter": _LETTERS,
        "number word": NUMBER_WORDS,
        "number": tuple(map(str, range(31))),
    }

    for name, row in rows.items():
        circle = name in ("day", "month")
        for shift, how in (
            (1, "that comes next"),
            (-1, "just before it"),
            (2, "two steps later"),
            (-2, "two steps earlier"),
        ):
            yield Recipe(
                "sequence",
                "Pattern Continuation",
                f"{name} {shift:+d}",
                (f"For every {name} given, write the {name} {how}.", f"Replace each {name} by the {name} {how}."),
                partial(_neighbours, row=row, shift=shift, circle=circle),
            )
        for step in (1, 2, -1):
            if circle:
                continue

            direction = {1: "goes up one by one", 2: "leaves out every second one", -1: "goes backwards"}[step]
            yield Recipe(
                "sequence",
                "Pattern Continuation",
                f"{name} series {step:+d}",
                (
                    f"The series of {name}s {direction}. Write the next one.",
                    f"Which {name} follows? The series {direction}.",
                ),
                partial(_next_of_three, row=row, step=step),
            )


def _continue_pattern(
    rng: Random, *, category: str, size: int, shown: tuple[int, ...], hidden: tuple[int, ...]
) -> tuple[str, str]:
    words = rng.sample(CATEGORIES[category], size)
    return " ".join(words[place] for place in shown), " ".join(words[place] for place in hidden)


def _neighbours(rng: Random, *, row: tuple[str, ...], shift: int, circle: bool) -> tuple[str, str]:
    inner = range(len(row)) if circle else range(2, len(row) - 2)
    places = rng.sample(inner, rng.randint(1, 2))
    return ", ".join(row[p] for p in places), ", ".join(row[(p + shift) % len(row)] for p in places)


def _next_of_three(rng: Random, *, row: tuple[str, ...], step: int) -> tuple[str, str]:
    inside = [start for start in range(len(row)) if 0 <= start + 3 * step < len(row)]
    start = rng.choice(inside)
    return ", ".join(row[start + k * step] for k in range(3)), row[start + 3 * step]


def number_recipes() -> Iterator[Recipe]:
    """Yield small arithmetic on digits, number words and short stories."""
    operations: dict[str, tuple[str, Callable[[int, int], int], str]] = {
        "sum": ("add the two numbers", lambda a, b: a + b, "plus"),
        "difference": ("subtract the second number from the first", lambda a, b: a - b, "minus"),
        "larger": ("write the larger number", max, "or"),
        "smaller": ("write the smaller number", min, "or"),
        "first": ("write the first number", lambda a, b: a, "and"),
        "second": ("write the second number", lambda a, b: b, "and"),
        "sum plus one": ("add both numbers and one more", lambda a, b: a + b + 1, "plus"),
        "twice the first": ("double the first number", lambda a, b: 2 * a, "and"),
        "twice the second": ("double the second number", lambda a, b: 2 * b, "and"),
        "one more": ("add one to the first number", lambda a, b: a + 1, "and"),
        "one less": ("take one from the first number", lambda a, b: a - 1, "and"),
    }

    for name, (how, compute, joined) in operations.items():
        for source in ("digits", "words"):
            for target in ("digits", "words"):
                yield Recipe(
                    "arithmetic",
                    "Mathematics",
                    f"{name}; {source} to {target}",
                    (
                        f"Two numbers are given in {source}: {how}. Answer in {target}.",
                        f"From the numbers, in {source}, {how} and write the result in {target}.",
                    ),
                    partial(_calculate, compute=compute, joined=joined, source=source, target=target),
                )

    for verb, sign in (("got", 1), ("lost", -1), ("found", 1), ("sold", -1), ("bought", 1), ("ate", -1)):
        for category in ("fruit", "tool", "garment", "flower"):
            if verb == "ate" and category != "fruit":
                continue
            yield Recipe(
                "story_sum",
                "Mathematics",
                f"{verb}; {category}",
                (
                    f"Somebody had some {PLURAL_CATEGORIES[category]} and {verb} some. "
                    f"Write the number now and the {category}.",
                    f"How many of the {PLURAL_CATEGORIES[category]} are there after the person {verb} some? "
                    f"Write number and {category}.",
                ),
                partial(_story_sum, verb=verb, sign=sign, category=category),
            )

    for source, target, how in (
        ("digit", "word", "Write the number in letters"),
        ("word", "digit", "Write the number in digits"),
    ):
        for count in (1, 2, 3):
            yield Recipe(
                "number_form",
                "Number Conversion",
                f"{source} to {target}; {count}",
                (
                    f"{how}. There are {NUMBER_WORDS[count]} in the input.",
                    f"{NUMBER_WORDS[count].capitalize()} in {source}s: change to {target}s.",
                ),
                partial(_convert, source=source, count=count),
            )
    comparisons: dict[str, tuple[str, Callable[[int, int], str]]] = {
        "larger person": ("has more", lambda a, b: "first" if a > b else "second"),
        "smaller person": ("has fewer", lambda a, b: "first" if a < b else "second"),
    }

    for name, (how, compare) in comparisons.items():
        for noun in OBJECTS[::9]:
            yield Recipe(
                "compare",
                "Mathematics",
                f"{name}; {noun}",
                (
                    f"Two people have something of the kind {noun}. Write who {how}.",
                    f"Who {how} of: {noun}? Write the name.",
                ),
                partial(_who, compare=compare, noun=noun),
            )


def _calculate(
    rng: Random, *, compute: Callable[[int, int], int], joined: str, source: str, target: str
) -> tuple[str, str]:
    b = rng.randint(1, 9)
    a = rng.randint(b, 10)
    if joined == "or" and rng.random() < 0.5:
        a, b = b, a
    answer = compute(a, b)
    shown = (str(a), str(b)) if source == "digits" else (NUMBER_WORDS[a], NUMBER_WORDS[b])
    return f"{shown[0]} {joined} {shown[1]}", str(answer) if target == "digits" else NUMBER_WORDS[answer]


def _story_sum(rng: Random, *, verb: str, sign: int, category: str) -> tuple[str, str]:
    noun, name = rng.choice(CATEGORIES[category]), rng.choice(NAMES)
    b = rng.randint(1, 5)
    a = rng.randint(b, 9)
    return f"{name} had {a} of the kind {noun} and {verb} {b}.", f"{a + sign * b} {noun}"


def _convert(rng: Random, *, source: str, count: int) -> tuple[str, str]:
    numbers = [rng.randrange(len(NUMBER_WORDS)) for _ in range(count)]
    digits, words = ", ".join(map(str, numbers)), ", ".join(NUMBER_WORDS[n] for n in numbers)
    return (digits, words) if source == "digit" else (words, digits)


def _who(rng: Random, *, compare: Callable[[int, int], str], noun: str) -> tuple[str, str]:
    one, other = rng.sample(NAMES, 2)
    a, b = rng.sample(range(1, 10), 2)
    return f"{one}: {a} x {noun}, {other}: {b} x {noun}", one if compare(a, b) == "first" else other


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
