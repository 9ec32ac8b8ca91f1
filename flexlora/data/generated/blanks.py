"""Makes tasks that fill the blank of a sentence."""

from collections.abc import Iterator
from functools import partial
from random import Random

from flexlora.data.generated.clauses import THINGS, draw_clause, pronoun
from flexlora.data.generated.lexicon import ADJECTIVES, CATEGORIES, CITIES, NAMES, OPPOSITES, PLURALS, VERBS, WOMEN
from flexlora.data.generated.recipe import MakeInstance, Recipe, capitalised, with_article


def complete_recipes() -> Iterator[Recipe]:
    """Yield fill-in tasks: the blank is decided by grammar or by a table of words."""
    for name, (what, make) in _blanks().items():
        yield Recipe(
            "blank",
            "Fill in The Blank",
            f"{name}; word",
            (
                f"Write the word that belongs in the blank: {what}.",
                f"Fill the blank with {what}. Answer with this word only.",
            ),
            make,
        )
        yield Recipe(
            "blank",
            "Fill in The Blank",
            f"{name}; sentence",
            (f"Copy the text with the blank filled by {what}.", f"Write the whole text. In the blank put {what}."),
            partial(_filled_sentence, make=make),
        )


def _blanks() -> dict[str, tuple[str, MakeInstance]]:
    """Return name -> what fills the blank, and how an instance is made."""
    return {
        "article": ("a or an", _blank_article),
        "be": ("am, is or are", _blank_be),
        "he or she": ("He or She", _blank_he_or_she),
        "his or her": ("his or her", _blank_his_or_her),
        "third person": (
            "the right form of the verb in brackets",
            partial(_blank_verb, index=1, frame="Every day {name} _ ({verb}) the {noun}."),
        ),
        "past": (
            "the past form of the verb in brackets",
            partial(_blank_verb, index=2, frame="Yesterday {name} _ ({verb}) the {noun}."),
        ),
        "participle": (
            "the participle of the verb in brackets",
            partial(_blank_verb, index=3, frame="{name} has _ ({verb}) the {noun}."),
        ),
        "gerund": (
            "the ing form of the verb in brackets",
            partial(_blank_verb, index=4, frame="Now {name} is _ ({verb}) the {noun}."),
        ),
        "opposite": ("the opposite of the adjective", _blank_opposite),
        "country": ("the country of the city", _blank_country),
    }


def _blank_article(rng: Random) -> tuple[str, str]:
    clause = draw_clause(rng, adjective=rng.random() < 0.5)
    return f"{clause.subject} {clause.verb[2]} _ {clause.thing()}.", with_article(clause.thing()).split()[0]


def _blank_be(rng: Random) -> tuple[str, str]:
    subject, verb = rng.choice(
        (
            ("I", "am"),
            ("You", "are"),
            ("We", "are"),
            ("They", "are"),
            (rng.choice(NAMES), "is"),
            ("The " + rng.choice(THINGS), "is"),
            ("The " + PLURALS[rng.choice(THINGS)], "are"),
        )
    )
    return f"{subject} _ {rng.choice(ADJECTIVES)}.", verb


def _blank_he_or_she(rng: Random) -> tuple[str, str]:
    name, places = rng.choice(NAMES), CATEGORIES["place"]
    return (
        f"{name} is in the {rng.choice(places)}. _ {rng.choice(VERBS)[1]} the {rng.choice(THINGS)}.",
        capitalised(pronoun(name)),
    )


def _blank_his_or_her(rng: Random) -> tuple[str, str]:
    name = rng.choice(NAMES)
    return f"{name} {rng.choice(VERBS)[2]} _ {rng.choice(THINGS)}.", "her" if name in WOMEN else "his"


def _blank_verb(rng: Random, *, index: int, frame: str) -> tuple[str, str]:
    verb = rng.choice(VERBS)
    return frame.format(name=rng.choice(NAMES), noun=rng.choice(THINGS), verb=verb[0]), verb[index]


def _blank_opposite(rng: Random) -> tuple[str, str]:
    adjective = rng.choice(ADJECTIVES)
    return f"It is not {adjective}, it is _.", OPPOSITES[adjective]


def _blank_country(rng: Random) -> tuple[str, str]:
    city = rng.choice(tuple(CITIES))
    return f"{rng.choice(NAMES)} flew to {city}, in _.", CITIES[city]


def _filled_sentence(rng: Random, *, make: MakeInstance) -> tuple[str, str]:
    text, answer = make(rng)
    return text, text.replace("_", answer).split(" (")[0] + (text.split(")")[1] if ")" in text else "")
