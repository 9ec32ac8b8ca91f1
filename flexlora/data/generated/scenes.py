"""Holds the scenes of the little passages: a sentence over named fields and a question for every field."""

from dataclasses import dataclass
from random import Random

from flexlora.data.generated.lexicon import ADJECTIVES, CATEGORIES, CITIES, DAYS, NAMES, NUMBER_WORDS, OBJECTS


@dataclass(frozen=True)
class Scene:
    """A template of one sentence over named fields, with a question for every field."""

    name: str
    sentence: str
    questions: dict[str, str]


DRAWS: dict[str, tuple[str, ...]] = {
    "name": NAMES,
    "friend": NAMES,
    "city": tuple(CITIES),
    "day": DAYS,
    "thing": OBJECTS,
    "colour": CATEGORIES["colour"],
    "place": CATEGORIES["place"],
    "job": CATEGORIES["job"],
    "age": NUMBER_WORDS[2:],
    "dish": CATEGORIES["dish"],
    "drink": CATEGORIES["drink"],
    "sport": CATEGORIES["sport"],
    "vehicle": CATEGORIES["vehicle"],
    "instrument": CATEGORIES["instrument"],
    "animal": CATEGORIES["animal"],
    "quality": ADJECTIVES,
    "price": tuple(str(number) for number in range(2, 100)),
}

SCENES: tuple[Scene, ...] = (
    Scene(
        "purchase",
        "On {day} {name} bought a {colour} {thing} in {city}.",
        {
            "name": "Who bought the {thing}?",
            "colour": "What colour is the {thing}?",
            "thing": "What did {name} buy?",
            "city": "Where did {name} buy the {thing}?",
            "day": "When did {name} buy the {thing}?",
        },
    ),
    Scene(
        "person",
        "{name} from {city} is {age} years old and works as a {job}.",
        {
            "name": "Who works as a {job}?",
            "city": "Where does {name} come from?",
            "age": "How old is {name}?",
            "job": "What is the job of {name}?",
        },
    ),
    Scene(
        "meal",
        "{name} ate {dish} and drank {drink} with {friend} at the {place}.",
        {
            "name": "Who ate {dish}?",
            "dish": "What did {name} eat?",
            "drink": "What did {name} drink?",
            "friend": "With whom did {name} eat?",
            "place": "Where did {name} eat?",
        },
    ),
    Scene(
        "journey",
        "On {day} {name} went from the {place} to {city} by {vehicle}.",
        {
            "name": "Who went to {city}?",
            "place": "Where did {name} start?",
            "city": "Where did {name} go?",
            "vehicle": "How did {name} travel?",
            "day": "When did {name} travel?",
        },
    ),
    Scene(
        "lesson",
        "Every {day} {name} teaches {friend} to play the {instrument} in the {place}.",
        {
            "name": "Who is the teacher?",
            "friend": "Who is the pupil?",
            "instrument": "What does {friend} learn to play?",
            "day": "On which day is the lesson?",
            "place": "Where is the lesson?",
        },
    ),
    Scene(
        "pet",
        "The {quality} {animal} of {name} sleeps in the {place}.",
        {
            "name": "Whose {animal} is it?",
            "animal": "Which animal does {name} have?",
            "quality": "What is the {animal} like?",
            "place": "Where does the {animal} sleep?",
        },
    ),
    Scene(
        "sale",
        "The {quality} {thing} in the {place} costs {price} coins.",
        {
            "thing": "What can you buy?",
            "price": "How much does the {thing} cost?",
            "quality": "What is the {thing} like?",
            "place": "Where is the {thing}?",
        },
    ),
    Scene(
        "game",
        "{name} won the {sport} match against {friend} in {city} on {day}.",
        {
            "name": "Who won?",
            "friend": "Who lost?",
            "sport": "Which sport did they play?",
            "city": "Where was the match?",
            "day": "When was the match?",
        },
    ),
    Scene(
        "gift",
        "{name} gave {friend} a {quality} {thing} at the {place}.",
        {
            "name": "Who gave the {thing}?",
            "friend": "Who got the {thing}?",
            "thing": "What did {friend} get?",
            "quality": "What was the {thing} like?",
            "place": "Where did {friend} get it?",
        },
    ),
    Scene(
        "search",
        "{name} looked for the {colour} {thing} and found it at the {place} on {day}.",
        {
            "name": "Who looked for the {thing}?",
            "thing": "What was lost?",
            "colour": "What colour was the {thing}?",
            "place": "Where was the {thing}?",
            "day": "When was the {thing} found?",
        },
    ),
)


def draw_scene(rng: Random, scene: Scene) -> dict[str, str]:
    """Draw a value for every field of the scene, with two different people."""
    values = {name: rng.choice(DRAWS[name]) for name in scene.questions}
    if "friend" in values:
        values["name"], values["friend"] = rng.sample(NAMES, 2)
    return values


_FIELD_WORDS: dict[str, str] = {
    "name": "the person named first in the event",
    "friend": "the other person",
    "city": "the city",
    "day": "the day",
    "thing": "the thing",
    "colour": "the colour",
    "place": "the place",
    "job": "the job",
    "age": "the age",
    "dish": "the food",
    "drink": "the drink",
    "sport": "the sport",
    "vehicle": "the vehicle",
    "instrument": "the instrument",
    "animal": "the animal",
    "quality": "the adjective",
    "price": "the price",
}


def spoken(field: str) -> str:
    """Return how a definition speaks of a field of a scene."""
    return "the person" if field == "name" else _FIELD_WORDS[field]
