"""Makes tasks that continue patterns of words and count on in rows of days, months, letters and numbers."""

from collections.abc import Iterator
from functools import partial
from random import Random
from string import ascii_lowercase

from flexlora.data.generated.lexicon import CATEGORIES, DAYS, MONTHS, NUMBER_WORDS, PLURAL_CATEGORIES
from flexlora.data.generated.recipe import Recipe

# Shape -> number of different words, those shown and those to be written.
_SHAPES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "ABAB": (2, (0, 1, 0, 1), (0, 1)),
    "AAB": (2, (0, 0, 1, 0, 0), (1,)),
    "ABB": (2, (0, 1, 1, 0), (1, 1)),
    "ABC": (3, (0, 1, 2, 0), (1, 2)),
    "ABA mirror": (3, (0, 1, 2), (2, 1, 0)),
    "AABB": (2, (0, 0, 1, 1, 0), (0, 1, 1)),
    "ABCC": (3, (0, 1, 2, 2, 0), (1, 2, 2)),
}
_ROWS: dict[str, tuple[str, ...]] = {
    "day": DAYS,
    "month": MONTHS,
    "letter": tuple(ascii_lowercase),
    "number word": NUMBER_WORDS,
    "number": tuple(map(str, range(31))),
}
_SHIFTS = ((1, "that comes next"), (-1, "just before it"), (2, "two steps later"), (-2, "two steps earlier"))
_STEPS = ((1, "goes up one by one"), (2, "leaves out every second one"), (-1, "goes backwards"))


def pattern_recipes() -> Iterator[Recipe]:
    """Yield continuations of patterns of words."""
    for number, (shape, (size, shown, hidden)) in enumerate(_SHAPES.items()):
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


def row_recipes() -> Iterator[Recipe]:
    """Yield tasks that count on or back in rows of days, months, letters and numbers."""
    for name, row in _ROWS.items():
        circle = name in ("day", "month")
        for shift, how in _SHIFTS:
            yield Recipe(
                "sequence",
                "Pattern Continuation",
                f"{name} {shift:+d}",
                (f"For every {name} given, write the {name} {how}.", f"Replace each {name} by the {name} {how}."),
                partial(_neighbours, row=row, shift=shift, circle=circle),
            )
        for step, direction in () if circle else _STEPS:
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
