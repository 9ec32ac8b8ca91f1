"""Makes tasks that turn data into text and back."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from random import Random

from flexlora.data.generated.recipe import Recipe
from flexlora.data.generated.scenes import Scene, draw_scene

# Writes the fields with these names.
Write = Callable[[tuple[str, ...], dict[str, str]], str]

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

# Name, how a definition describes it, and how the values are written.
_NOTATIONS: tuple[tuple[str, str, Write], ...] = (
    ("named", "fields with their names", lambda keys, v: ", ".join(f"{key}: {v[key]}" for key in keys)),
    ("bare", "values with commas", lambda keys, v: ", ".join(v[key] for key in keys)),
    ("barred", "a row with bars", lambda keys, v: " | ".join(v[key] for key in keys)),
)


def report_recipes() -> Iterator[Recipe]:
    """Yield data-to-text tasks and their inverse, for several notations of the data."""
    for number, (name, keys, sentence) in enumerate(_REPORTS):
        scene = Scene(name, sentence, dict.fromkeys(keys, ""))
        shape = sentence.replace("{", "[").replace("}", "]")
        for place, (notation, described, write) in enumerate(_NOTATIONS):
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


def _to_text(rng: Random, *, scene: Scene, order: tuple[str, ...], write: Write) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return write(order, values), scene.sentence.format(**values)


def _to_data(rng: Random, *, scene: Scene, order: tuple[str, ...], write: Write) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), write(order, values)
