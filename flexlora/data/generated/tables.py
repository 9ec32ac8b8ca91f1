"""Which tasks turn data into text and back, and look things up in a short table."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from random import Random

from flexlora.data.generated.recipe import Recipe, with_article
from flexlora.data.generated.scenes import DRAWS, Scene, draw_scene, spoken

_REPORTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("birthday", ("name", "age", "city"), "{name} turned {age} in {city}."),
    ("ticket", ("city", "vehicle", "price"), "The {vehicle} to {city} costs {price} coins."),
    ("menu", ("dish", "drink", "price"), "You get {dish} and {drink} for {price} coins."),
    ("order", ("name", "dish", "drink"), "{name} would like {dish} with {drink}."),
    ("shop", ("thing", "colour", "price"), "The {colour} {thing} is sold for {price} coins."),
    ("move", ("name", "city", "day"), "{name} moves to {city} on {day}."),
    ("hobby", ("name", "sport", "day"), "{name} does {sport} every {day}."),
    ("concert", ("name", "instrument", "place"), "{name} plays the {instrument} at the {place}."),
    ("staff", ("name", "job", "place"), "{name}, a {job}, can be found at the {place}."),
    ("zoo", ("animal", "quality", "city"), "A {quality} {animal} lives in {city}."),
    ("loss", ("name", "thing", "place"), "{name} lost the {thing} at the {place}."),
    ("meeting", ("name", "friend", "place"), "{name} meets {friend} at the {place}."),
    ("letter", ("name", "friend", "city"), "{friend} got a letter from {name} in {city}."),
    ("trip", ("name", "vehicle", "city"), "{name} takes the {vehicle} to {city}."),
    ("offer", ("thing", "quality", "name"), "Is anyone looking for a {quality} {thing}? Ask {name}."),
    ("weather", ("city", "day", "quality"), "In {city} it will be {quality} on {day}."),
    ("result", ("name", "friend", "sport"), "{name} beat {friend} in {sport}."),
    ("class", ("instrument", "day", "age"), "The {instrument} class on {day} has {age} pupils."),
    ("menu day", ("day", "dish", "place"), "On {day} the {place} serves {dish}."),
    ("delivery", ("thing", "city", "day"), "The {thing} will reach {city} by {day}."),
)


def report_recipes() -> Iterator[Recipe]:
    """Yield data-to-text tasks and their inverse, for several notations of the data."""
    notations: tuple[tuple[str, str, Callable[[tuple[str, ...], dict[str, str]], str]], ...] = (
        ("named", "fields with their names", lambda keys, v: ", ".join(f"{key}: {v[key]}" for key in keys)),
        ("bare", "values with commas", lambda keys, v: ", ".join(v[key] for key in keys)),
        ("barred", "a row with bars", lambda keys, v: " | ".join(v[key] for key in keys)),
    )

    for number, (name, keys, sentence) in enumerate(_REPORTS):
        scene = Scene(name, sentence, dict.fromkeys(keys, ""))
        shape = sentence.replace("{", "[").replace("}", "]")
        for place, (notation, described, write) in enumerate(notations):
            order = list(permutations(keys))[(number + 2 * place) % 6]

            yield Recipe(
                "report",
                "Data to Text",
                f"{name}; {' '.join(order)}; {notation}",
                (
                    f"Write the {name} data ({', '.join(order)}; {described}) in this form: {shape}",
                    f"You get {described}: {', '.join(order)}. Write them as: {shape}",
                    f"You get {described}. Use them in this sentence: {shape}",
                ),
                partial(_to_text, scene=scene, order=order, write=write),
            )
            if place == number % 3:
                yield Recipe(
                    "table",
                    "Information Extraction",
                    f"{name}; {' '.join(order)}; {notation}",
                    (
                        f"Turn the sentence on a {name} into {described}: {', '.join(order)}.",
                        f"List {', '.join(order)} of the {name} as {described}.",
                    ),
                    partial(_to_data, scene=scene, order=order, write=write),
                )


def _to_text(
    rng: Random, *, scene: Scene, order: tuple[str, ...], write: Callable[[tuple[str, ...], dict[str, str]], str]
) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return write(order, values), scene.sentence.format(**values)


def _to_data(
    rng: Random, *, scene: Scene, order: tuple[str, ...], write: Callable[[tuple[str, ...], dict[str, str]], str]
) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), write(order, values)


def lookup_recipes() -> Iterator[Recipe]:
    """Yield look-ups in a short table given in the input, in both directions, and in two hops."""
    kinds = (
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
    marks = ((": ", ", "), ("=", "; "), (" -> ", ", "), (" - ", " / "))

    for number, (key, value) in enumerate(kinds):
        between, after = marks[number % len(marks)]

        read = partial(_draw_table, key=key, value=value, between=between, after=after)
        one, other = spoken(key).removeprefix("the "), spoken(value).removeprefix("the ")
        forms = (
            (
                "forward",
                partial(_value_of_key, table=read),
                (
                    f"A table gives {with_article(other)} for every {one}. Answer the question at the end.",
                    f"Look up the {one} at the end of the text in the table and write the {other}.",
                ),
            ),
            (
                "backward",
                partial(_key_of_value, table=read),
                (
                    f"A table gives {with_article(other)} for every {one}. Write the {one} for the {other} at the end.",
                    f"Which {one} has the {other} that is asked for at the end?",
                ),
            ),
            (
                "keys",
                partial(_all_keys, table=read),
                (
                    f"Each {one} has {with_article(other)}. Write only every {one}, in order, with commas.",
                    f"List the left side of the table of {one} and {other}, with commas.",
                ),
            ),
            (
                "values",
                partial(_all_values, table=read),
                (
                    f"Each {one} has {with_article(other)}. Write only every {other}, in order, with commas.",
                    f"List the right side of the table of {one} and {other}, with commas.",
                ),
            ),
            (
                "last",
                partial(_last_pair, table=read),
                (
                    f"Write the last {one} and {other} of the table, with and between them.",
                    f"Take the final pair of the table of {one} and {other}. Join the two with and.",
                ),
            ),
            (
                "swapped",
                partial(_swapped, table=read, between=between, after=after),
                (
                    f"Swap the sides of the table, so that every {other} stands before its {one}.",
                    f"Write the table of {one} and {other} with the two sides exchanged.",
                ),
            ),
        )
        for name, make, phrasings in forms:
            yield Recipe("lookup", "Table Lookup", f"{key} to {value}; {name}", phrasings, make)


def _draw_table(rng: Random, *, key: str, value: str, between: str, after: str) -> tuple[str, list[str], list[str]]:
    keys, values = rng.sample(DRAWS[key], 3), rng.sample(DRAWS[value], 3)
    return after.join(f"{k}{between}{v}" for k, v in zip(keys, values, strict=True)), keys, values


def _value_of_key(rng: Random, *, table: Callable[..., tuple[str, list[str], list[str]]]) -> tuple[str, str]:
    text, keys, values = table(rng)
    place = rng.randrange(3)
    return f"{text}. {keys[place]}?", values[place]


def _key_of_value(rng: Random, *, table: Callable[..., tuple[str, list[str], list[str]]]) -> tuple[str, str]:
    text, keys, values = table(rng)
    place = rng.randrange(3)
    return f"{text}. {values[place]}?", keys[place]


def _all_keys(rng: Random, *, table: Callable[..., tuple[str, list[str], list[str]]]) -> tuple[str, str]:
    text, keys, _ = table(rng)
    return text, ", ".join(keys)


def _all_values(rng: Random, *, table: Callable[..., tuple[str, list[str], list[str]]]) -> tuple[str, str]:
    text, _, values = table(rng)
    return text, ", ".join(values)


def _last_pair(rng: Random, *, table: Callable[..., tuple[str, list[str], list[str]]]) -> tuple[str, str]:
    text, keys, values = table(rng)
    return text, f"{keys[-1]} and {values[-1]}"


def _swapped(
    rng: Random, *, table: Callable[..., tuple[str, list[str], list[str]]], between: str, after: str
) -> tuple[str, str]:
    text, keys, values = table(rng)
    return text, after.join(f"{v}{between}{k}" for k, v in zip(keys, values, strict=True))
