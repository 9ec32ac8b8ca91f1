"""Draws a simple sentence about a person and a thing, and writes it in its grammatical forms."""

from dataclasses import dataclass
from random import Random

from flexlora.data.generated.lexicon import ADJECTIVES, NAMES, OBJECTS, OPPOSITES, PLURALS, VERBS, WOMEN
from flexlora.data.generated.recipe import capitalised

THINGS: tuple[str, ...] = tuple(noun for noun in OBJECTS if noun in PLURALS and PLURALS[noun] != noun)


@dataclass(frozen=True)
class Clause:
    """Who does what to which thing: the content of one simple sentence."""

    subject: str
    verb: tuple[str, str, str, str, str]
    adjective: str
    noun: str

    def thing(self) -> str:
        """Return the object without its article."""
        return f"{self.adjective} {self.noun}".strip()


def draw_clause(rng: Random, adjective: bool = True) -> Clause:
    """Draw a clause about a person and a thing."""
    return Clause(rng.choice(NAMES), rng.choice(VERBS), rng.choice(ADJECTIVES) if adjective else "", rng.choice(THINGS))


def pronoun(name: str) -> str:
    """Return she or he."""
    return "she" if name in WOMEN else "he"


def write_clause(clause: Clause, form: str) -> str:
    """Write the clause in one grammatical form, as a full sentence."""
    name, (base, third, past, participle, gerund), thing = clause.subject, clause.verb, clause.thing()
    forms = {
        "present": f"{name} {third} the {thing}.",
        "past": f"{name} {past} the {thing}.",
        "future": f"{name} will {base} the {thing}.",
        "progressive": f"{name} is {gerund} the {thing}.",
        "perfect": f"{name} has {participle} the {thing}.",
        "negative": f"{name} does not {base} the {thing}.",
        "past negative": f"{name} did not {base} the {thing}.",
        "question": f"Does {name} {base} the {thing}?",
        "past question": f"Did {name} {base} the {thing}?",
        "passive": f"The {thing} was {participle} by {name}.",
        "command": f"{capitalised(base)} the {thing}!",
        "polite": f"Please {base} the {thing}.",
        "I": f"I {base} the {thing}.",
        "we": f"We {base} the {thing}.",
        "they": f"They {base} the {thing}.",
        "pronoun": f"{capitalised(pronoun(name))} {third} the {thing}.",
        "can": f"{name} can {base} the {thing}.",
        "must": f"{name} must {base} the {thing}.",
        "may": f"{name} may {base} the {thing}.",
        "plural": f"{name} {third} the {clause.adjective} {PLURALS[clause.noun]}.",
        "wants": f"{name} hopes to {base} the {thing}.",
        "cleft": f"It is {name} who {third} the {thing}.",
        "tag": f"{name} {third} the {thing}, right?",
        "opposite": f"{name} {third} the {OPPOSITES.get(clause.adjective, clause.adjective)} {clause.noun}.",
        "bare": f"{name} {third} the {clause.noun}.",
        "past plural": f"{name} {past} the {clause.adjective} {PLURALS[clause.noun]}.",
        "past pronoun": f"{capitalised(pronoun(name))} {past} the {thing}.",
        "future negative": f"{name} will not {base} the {thing}.",
        "headline": f"{name} {third} {thing}",
        "noun phrase": f"the {thing} of {name}",
    }
    return forms[form]
