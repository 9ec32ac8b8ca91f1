"""Makes tasks that calculate, compare and write numbers."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, NAMES, NUMBER_WORDS, OBJECTS, PLURAL_CATEGORIES
from flexlora.data.generated.recipe import Recipe

# Operation -> what to do, how the answer is computed, and the word between the two numbers.
_OPERATIONS: dict[str, tuple[str, Callable[[int, int], int], str]] = {
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


def number_recipes() -> Iterator[Recipe]:
    """Yield small arithmetic on digits and number words."""
    for name, (how, compute, joined) in _OPERATIONS.items():
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


def story_recipes() -> Iterator[Recipe]:
    """Yield short stories about somebody who gets or loses things: how many are left?"""
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


def _story_sum(rng: Random, *, verb: str, sign: int, category: str) -> tuple[str, str]:
    noun, name = rng.choice(CATEGORIES[category]), rng.choice(NAMES)
    b = rng.randint(1, 5)
    a = rng.randint(b, 9)
    return f"{name} had {a} of the kind {noun} and {verb} {b}.", f"{a + sign * b} {noun}"


def number_form_recipes() -> Iterator[Recipe]:
    """Yield tasks that write digits as words and words as digits."""
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


def _convert(rng: Random, *, source: str, count: int) -> tuple[str, str]:
    numbers = [rng.randrange(len(NUMBER_WORDS)) for _ in range(count)]
    digits, words = ", ".join(map(str, numbers)), ", ".join(NUMBER_WORDS[n] for n in numbers)
    return (digits, words) if source == "digit" else (words, digits)


def compare_recipes() -> Iterator[Recipe]:
    """Yield comparisons of what two people have."""
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


def _who(rng: Random, *, compare: Callable[[int, int], str], noun: str) -> tuple[str, str]:
    one, other = rng.sample(NAMES, 2)
    a, b = rng.sample(range(1, 10), 2)
    return f"{one}: {a} x {noun}, {other}: {b} x {noun}", one if compare(a, b) == "first" else other
