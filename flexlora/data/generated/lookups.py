"""Makes tasks that look things up in a short table."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.recipe import Recipe, with_article
from flexlora.data.generated.scenes import DRAWS, spoken

# Draws a table: its text, its keys and their values.
DrawTable = Callable[[Random], tuple[str, list[str], list[str]]]

# Fields of the two sides.
_KINDS = (
    ("name", "city"),
    ("name", "colour"),
    ("name", "animal"),
    ("name", "job"),
    ("thing", "price"),
    ("city", "day"),
    ("name", "dish"),
    ("thing", "colour"),
    ("name", "vehicle"),
    ("animal", "place"),
    ("day", "dish"),
    ("name", "instrument"),
)
# What stands between key and value, and between pairs.
_MARKS = ((": ", ", "), ("=", "; "), (" -> ", ", "), (" - ", " / "))


def lookup_recipes() -> Iterator[Recipe]:
    """Yield look-ups in a short table given in the input, in both directions, and rewritings of its sides."""
    for number, (key, value) in enumerate(_KINDS):
        between, after = _MARKS[number % len(_MARKS)]

        read = partial(_draw_table, key=key, value=value, between=between, after=after)
        one, other = spoken(key).removeprefix("the "), spoken(value).removeprefix("the ")
        phrasings = _phrasings(one, other)
        makes = {
            "forward": partial(_value_of_key, table=read),
            "backward": partial(_key_of_value, table=read),
            "keys": partial(_all_keys, table=read),
            "values": partial(_all_values, table=read),
            "last": partial(_last_pair, table=read),
            "swapped": partial(_swapped, table=read, between=between, after=after),
        }
        for name, make in makes.items():
            yield Recipe("lookup", "Table Lookup", f"{key} to {value}; {name}", phrasings[name], make)


def _phrasings(one: str, other: str) -> dict[str, tuple[str, str]]:
    """Return the definitions for a table of these two fields, by form."""
    return {
        "forward": (
            f"A table gives {with_article(other)} for every {one}. Answer the question at the end.",
            f"Look up the {one} at the end of the text in the table and write the {other}.",
        ),
        "backward": (
            f"A table gives {with_article(other)} for every {one}. Write the {one} for the {other} at the end.",
            f"Which {one} has the {other} that is asked for at the end?",
        ),
        "keys": (
            f"Each {one} has {with_article(other)}. Write only every {one}, in order, with commas.",
            f"List the left side of the table of {one} and {other}, with commas.",
        ),
        "values": (
            f"Each {one} has {with_article(other)}. Write only every {other}, in order, with commas.",
            f"List the right side of the table of {one} and {other}, with commas.",
        ),
        "last": (
            f"Write the last {one} and {other} of the table, with and between them.",
            f"Take the final pair of the table of {one} and {other}. Join the two with and.",
        ),
        "swapped": (
            f"Swap the sides of the table, so that every {other} stands before its {one}.",
            f"Write the table of {one} and {other} with the two sides exchanged.",
        ),
    }


def _draw_table(rng: Random, *, key: str, value: str, between: str, after: str) -> tuple[str, list[str], list[str]]:
    keys, values = rng.sample(DRAWS[key], 3), rng.sample(DRAWS[value], 3)
    return after.join(f"{k}{between}{v}" for k, v in zip(keys, values, strict=True)), keys, values


def _value_of_key(rng: Random, *, table: DrawTable) -> tuple[str, str]:
    text, keys, values = table(rng)
    place = rng.randrange(3)
    return f"{text}. {keys[place]}?", values[place]


def _key_of_value(rng: Random, *, table: DrawTable) -> tuple[str, str]:
    text, keys, values = table(rng)
    place = rng.randrange(3)
    return f"{text}. {values[place]}?", keys[place]


def _all_keys(rng: Random, *, table: DrawTable) -> tuple[str, str]:
    text, keys, _ = table(rng)
    return text, ", ".join(keys)


def _all_values(rng: Random, *, table: DrawTable) -> tuple[str, str]:
    text, _, values = table(rng)
    return text, ", ".join(values)


def _last_pair(rng: Random, *, table: DrawTable) -> tuple[str, str]:
    text, keys, values = table(rng)
    return text, f"{keys[-1]} and {values[-1]}"


def _swapped(rng: Random, *, table: DrawTable, between: str, after: str) -> tuple[str, str]:
    text, keys, values = table(rng)
    return text, after.join(f"{v}{between}{k}" for k, v in zip(keys, values, strict=True))
