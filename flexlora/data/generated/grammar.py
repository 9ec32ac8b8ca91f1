"""Makes tasks that correct and judge sentences with a planted mistake."""

from collections.abc import Iterator
from functools import partial
from random import Random

from flexlora.data.generated.clauses import draw_clause, pronoun, write_clause
from flexlora.data.generated.lexicon import ADJECTIVES, DAYS, NAMES, PLURALS, WOMEN
from flexlora.data.generated.recipe import MakeInstance, Recipe, capitalised, with_article


def grammar_recipes() -> Iterator[Recipe]:
    """Yield corrections and judgements of sentences with one planted mistake each."""

    mistakes: dict[str, tuple[str, MakeInstance]] = {
        "third person": ("the verb lacks its third person form", _wrong_third_person),
        "plural": ("the noun should be in the plural", _wrong_plural),
        "article": ("a and an are mixed up", _wrong_article),
        "doubled word": ("one word is written twice", _doubled_word),
        "full stop": ("the full stop is missing", _no_full_stop),
        "capital": ("the first letter should be a capital", _no_capital),
        "tense": ("the verb should be in the past tense", _wrong_tense),
        "adjective order": ("the adjective stands after the noun", _wrong_order),
        "pronoun": ("the second sentence has the wrong pronoun", _wrong_pronoun),
        "is or are": ("is should be are", _wrong_be),
    }
    names = list(mistakes)

    for number, (name, (what, make)) in enumerate(mistakes.items()):
        other = names[(number + 3) % len(names)]
        yield from _one_mistake(name, what, make)
        yield from _one_of_two_mistakes((name, what, make), (other, *mistakes[other]))


def _one_mistake(name: str, what: str, make: MakeInstance) -> Iterator[Recipe]:
    yield Recipe(
        "correct",
        "Grammar Error Correction",
        name,
        (f"Correct the text: {what}.", f"In the text {what}. Write the correct text.", f"Fix the mistake; {what}."),
        make,
    )
    yield Recipe(
        "judge",
        "Grammar Error Detection",
        name,
        (
            f"Answer wrong if {what}, otherwise answer correct.",
            f"Is the text correct? It is wrong if {what}. Answer correct or wrong.",
        ),
        partial(_judge, make=make),
    )


def _one_of_two_mistakes(
    mistake: tuple[str, str, MakeInstance], other_mistake: tuple[str, str, MakeInstance]
) -> Iterator[Recipe]:
    (name, what, make), (other, other_what, other_make) = mistake, other_mistake
    yield Recipe(
        "judge",
        "Grammar Error Detection",
        f"{name} or {other}",
        (
            f"What is wrong with the text? Write {name} if {what}, and {other} if {other_what}.",
            f"Name the mistake: {name} ({what}) or {other} ({other_what}).",
        ),
        partial(_which_mistake, make=make, other_make=other_make, labels=(name, other)),
    )
    yield Recipe(
        "correct",
        "Grammar Error Correction",
        f"{name} or {other}",
        (
            f"Correct the text: either {what}, or {other_what}.",
            f"Fix the one mistake. Either {what} or {other_what}.",
        ),
        partial(_either_mistake, make=make, other_make=other_make),
    )


def _wrong_third_person(rng: Random) -> tuple[str, str]:
    clause = draw_clause(rng)
    return f"{clause.subject} {clause.verb[0]} the {clause.thing()}.", write_clause(clause, "present")


def _wrong_plural(rng: Random) -> tuple[str, str]:
    clause, count = draw_clause(rng, adjective=False), rng.choice(("two", "three", "four", "many"))
    return (
        f"{clause.subject} {clause.verb[2]} {count} {clause.noun}.",
        f"{clause.subject} {clause.verb[2]} {count} {PLURALS[clause.noun]}.",
    )


def _wrong_article(rng: Random) -> tuple[str, str]:
    clause = draw_clause(rng)
    right = with_article(clause.thing())
    wrong = ("a " if right.startswith("an ") else "an ") + clause.thing()
    return f"{clause.subject} {clause.verb[2]} {wrong}.", f"{clause.subject} {clause.verb[2]} {right}."


def _doubled_word(rng: Random) -> tuple[str, str]:
    words = write_clause(draw_clause(rng), "past").rstrip(".").split()
    place = rng.randrange(len(words))
    return " ".join([*words[: place + 1], *words[place:]]) + ".", " ".join(words) + "."


def _no_full_stop(rng: Random) -> tuple[str, str]:
    sentence = write_clause(draw_clause(rng), rng.choice(("past", "present", "future")))
    return sentence[:-1], sentence


def _no_capital(rng: Random) -> tuple[str, str]:
    sentence = write_clause(draw_clause(rng), rng.choice(("past", "present", "future")))
    return sentence[0].lower() + sentence[1:], sentence


def _wrong_tense(rng: Random) -> tuple[str, str]:
    clause, when = draw_clause(rng), rng.choice(DAYS)
    return (
        f"Last {when} {clause.subject} {clause.verb[1]} the {clause.thing()}.",
        f"Last {when} {clause.subject} {clause.verb[2]} the {clause.thing()}.",
    )


def _wrong_order(rng: Random) -> tuple[str, str]:
    clause = draw_clause(rng)
    return (
        f"{clause.subject} {clause.verb[2]} the {clause.noun} {clause.adjective}.",
        write_clause(clause, "past"),
    )


def _wrong_pronoun(rng: Random) -> tuple[str, str]:
    clause = draw_clause(rng)
    wrong = "her" if clause.subject in WOMEN else "him"
    return (
        f"{clause.subject} is here. {capitalised(wrong)} {clause.verb[1]} the {clause.noun}.",
        f"{clause.subject} is here. {capitalised(pronoun(clause.subject))} {clause.verb[1]} the {clause.noun}.",
    )


def _wrong_be(rng: Random) -> tuple[str, str]:
    one, other = rng.sample(NAMES, 2)
    adjective = rng.choice(ADJECTIVES)
    return f"{one} and {other} is {adjective}.", f"{one} and {other} are {adjective}."


def _judge(rng: Random, *, make: MakeInstance) -> tuple[str, str]:
    wrong, right = make(rng)
    return (wrong, "wrong") if rng.random() < 0.5 else (right, "correct")


def _which_mistake(
    rng: Random,
    *,
    make: MakeInstance,
    other_make: MakeInstance,
    labels: tuple[str, str],
) -> tuple[str, str]:
    first = rng.random() < 0.5
    return (make if first else other_make)(rng)[0], labels[0] if first else labels[1]


def _either_mistake(rng: Random, *, make: MakeInstance, other_make: MakeInstance) -> tuple[str, str]:
    return (make if rng.random() < 0.5 else other_make)(rng)
