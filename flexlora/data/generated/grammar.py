"""Which tasks correct, judge and complete sentences."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.clauses import THINGS, draw_clause, pronoun, write_clause
from flexlora.data.generated.lexicon import (
    ADJECTIVES,
    CATEGORIES,
    CITIES,
    DAYS,
    NAMES,
    OPPOSITES,
    PLURALS,
    VERBS,
    WOMEN,
)
from flexlora.data.generated.recipe import Recipe, capitalised, with_article


def grammar_recipes() -> Iterator[Recipe]:
    """Yield corrections and judgements of sentences with one planted mistake each."""

    def wrong_third(rng: Random) -> tuple[str, str]:
        clause = draw_clause(rng)
        return f"{clause.subject} {clause.verb[0]} the {clause.thing()}.", write_clause(clause, "present")

    def wrong_plural(rng: Random) -> tuple[str, str]:
        clause, count = draw_clause(rng, adjective=False), rng.choice(("two", "three", "four", "many"))
        return (
            f"{clause.subject} {clause.verb[2]} {count} {clause.noun}.",
            f"{clause.subject} {clause.verb[2]} {count} {PLURALS[clause.noun]}.",
        )

    def wrong_article(rng: Random) -> tuple[str, str]:
        clause = draw_clause(rng)
        right = with_article(clause.thing())
        wrong = ("a " if right.startswith("an ") else "an ") + clause.thing()
        return f"{clause.subject} {clause.verb[2]} {wrong}.", f"{clause.subject} {clause.verb[2]} {right}."

    def doubled(rng: Random) -> tuple[str, str]:
        words = write_clause(draw_clause(rng), "past").rstrip(".").split()
        place = rng.randrange(len(words))
        return " ".join([*words[: place + 1], *words[place:]]) + ".", " ".join(words) + "."

    def no_stop(rng: Random) -> tuple[str, str]:
        sentence = write_clause(draw_clause(rng), rng.choice(("past", "present", "future")))
        return sentence[:-1], sentence

    def small_name(rng: Random) -> tuple[str, str]:
        sentence = write_clause(draw_clause(rng), rng.choice(("past", "present", "future")))
        return sentence[0].lower() + sentence[1:], sentence

    def wrong_tense(rng: Random) -> tuple[str, str]:
        clause, when = draw_clause(rng), rng.choice(DAYS)
        return (
            f"Last {when} {clause.subject} {clause.verb[1]} the {clause.thing()}.",
            f"Last {when} {clause.subject} {clause.verb[2]} the {clause.thing()}.",
        )

    def wrong_order(rng: Random) -> tuple[str, str]:
        clause = draw_clause(rng)
        return (
            f"{clause.subject} {clause.verb[2]} the {clause.noun} {clause.adjective}.",
            write_clause(clause, "past"),
        )

    def wrong_pronoun(rng: Random) -> tuple[str, str]:
        clause = draw_clause(rng)
        wrong = "her" if clause.subject in WOMEN else "him"
        return (
            f"{clause.subject} is here. {capitalised(wrong)} {clause.verb[1]} the {clause.noun}.",
            f"{clause.subject} is here. {capitalised(pronoun(clause.subject))} {clause.verb[1]} the {clause.noun}.",
        )

    def wrong_be(rng: Random) -> tuple[str, str]:
        one, other = rng.sample(NAMES, 2)
        adjective = rng.choice(ADJECTIVES)
        return f"{one} and {other} is {adjective}.", f"{one} and {other} are {adjective}."

    mistakes: dict[str, tuple[str, Callable[[Random], tuple[str, str]]]] = {
        "third person": ("the verb lacks its third person form", wrong_third),
        "plural": ("the noun should be in the plural", wrong_plural),
        "article": ("a and an are mixed up", wrong_article),
        "doubled word": ("one word is written twice", doubled),
        "full stop": ("the full stop is missing", no_stop),
        "capital": ("the first letter should be a capital", small_name),
        "tense": ("the verb should be in the past tense", wrong_tense),
        "adjective order": ("the adjective stands after the noun", wrong_order),
        "pronoun": ("the second sentence has the wrong pronoun", wrong_pronoun),
        "is or are": ("is should be are", wrong_be),
    }
    names = list(mistakes)

    def judge(rng: Random, *, make: Callable[[Random], tuple[str, str]]) -> tuple[str, str]:
        wrong, right = make(rng)
        return (wrong, "wrong") if rng.random() < 0.5 else (right, "correct")

    def which(
        rng: Random,
        *,
        make: Callable[[Random], tuple[str, str]],
        other_make: Callable[[Random], tuple[str, str]],
        labels: tuple[str, str],
    ) -> tuple[str, str]:
        first = rng.random() < 0.5
        return (make if first else other_make)(rng)[0], labels[0] if first else labels[1]

    def either(
        rng: Random, *, make: Callable[[Random], tuple[str, str]], other_make: Callable[[Random], tuple[str, str]]
    ) -> tuple[str, str]:
        return (make if rng.random() < 0.5 else other_make)(rng)

    for number, (name, (what, make)) in enumerate(mistakes.items()):
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
            partial(judge, make=make),
        )
        other = names[(number + 3) % len(names)]
        other_what, other_make = mistakes[other]

        yield Recipe(
            "judge",
            "Grammar Error Detection",
            f"{name} or {other}",
            (
                f"What is wrong with the text? Write {name} if {what}, and {other} if {other_what}.",
                f"Name the mistake: {name} ({what}) or {other} ({other_what}).",
            ),
            partial(which, make=make, other_make=other_make, labels=(name, other)),
        )

        yield Recipe(
            "correct",
            "Grammar Error Correction",
            f"{name} or {other}",
            (
                f"Correct the text: either {what}, or {other_what}.",
                f"Fix the one mistake. Either {what} or {other_what}.",
            ),
            partial(either, make=make, other_make=other_make),
        )


def complete_recipes() -> Iterator[Recipe]:
    """Yield fill-in tasks: the blank is decided by grammar or by a table of words."""
    places = CATEGORIES["place"]

    def article(rng: Random) -> tuple[str, str]:
        clause = draw_clause(rng, adjective=rng.random() < 0.5)
        return f"{clause.subject} {clause.verb[2]} _ {clause.thing()}.", with_article(clause.thing()).split()[0]

    def be(rng: Random) -> tuple[str, str]:
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

    def he_she(rng: Random) -> tuple[str, str]:
        name = rng.choice(NAMES)
        return (
            f"{name} is in the {rng.choice(places)}. _ {rng.choice(VERBS)[1]} the {rng.choice(THINGS)}.",
            capitalised(pronoun(name)),
        )

    def his_her(rng: Random) -> tuple[str, str]:
        name = rng.choice(NAMES)
        return f"{name} {rng.choice(VERBS)[2]} _ {rng.choice(THINGS)}.", "her" if name in WOMEN else "his"

    def verb_form(index: int, frame: str) -> Callable[[Random], tuple[str, str]]:
        def make(rng: Random) -> tuple[str, str]:
            verb = rng.choice(VERBS)
            return frame.format(name=rng.choice(NAMES), noun=rng.choice(THINGS), verb=verb[0]), verb[index]

        return make

    def antonym(rng: Random) -> tuple[str, str]:
        adjective = rng.choice(ADJECTIVES)
        return f"It is not {adjective}, it is _.", OPPOSITES[adjective]

    def land(rng: Random) -> tuple[str, str]:
        city = rng.choice(tuple(CITIES))
        return f"{rng.choice(NAMES)} flew to {city}, in _.", CITIES[city]

    blanks: dict[str, tuple[str, Callable[[Random], tuple[str, str]]]] = {
        "article": ("a or an", article),
        "be": ("am, is or are", be),
        "he or she": ("He or She", he_she),
        "his or her": ("his or her", his_her),
        "third person": (
            "the right form of the verb in brackets",
            verb_form(1, "Every day {name} _ ({verb}) the {noun}."),
        ),
        "past": ("the past form of the verb in brackets", verb_form(2, "Yesterday {name} _ ({verb}) the {noun}.")),
        "participle": ("the participle of the verb in brackets", verb_form(3, "{name} has _ ({verb}) the {noun}.")),
        "gerund": ("the ing form of the verb in brackets", verb_form(4, "Now {name} is _ ({verb}) the {noun}.")),
        "opposite": ("the opposite of the adjective", antonym),
        "country": ("the country of the city", land),
    }

    def full(rng: Random, *, make: Callable[[Random], tuple[str, str]]) -> tuple[str, str]:
        text, answer = make(rng)
        return text, text.replace("_", answer).split(" (")[0] + (text.split(")")[1] if ")" in text else "")

    for name, (what, make) in blanks.items():
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
            partial(full, make=make),
        )
