"""Makes tasks that edit a sentence word by word."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.clauses import THINGS, draw_clause, write_clause
from flexlora.data.generated.lexicon import DAYS, NAMES
from flexlora.data.generated.recipe import Recipe, capitalised

# Name, two ways to ask for it, and what it makes of the words of a sentence.
WordStep = tuple[str, tuple[str, str], Callable[[list[str]], list[str]]]

_STEPS: tuple[WordStep, ...] = (
    ("repeat last", ("repeat the last word", "write the last word once more"), lambda w: [*w, w[-1]]),
    ("repeat first", ("repeat the first word", "write the first word twice"), lambda w: [w[0], *w]),
    ("drop first", ("delete the first word", "leave out the word at the start"), lambda w: w[1:]),
    ("drop last", ("delete the last word", "leave out the word at the end"), lambda w: w[:-1]),
    ("drop the", ("delete the word the", "leave out the article"), lambda w: [x for x in w if x != "the"]),
    (
        "swap front",
        ("swap the first two words", "exchange the two words at the start"),
        lambda w: [w[1], w[0], *w[2:]],
    ),
    (
        "swap back",
        ("swap the last two words", "exchange the two words at the end"),
        lambda w: [*w[:-2], w[-1], w[-2]],
    ),
    ("reverse", ("write the words in reverse order", "write it backwards, word by word"), lambda w: w[::-1]),
    (
        "a for the",
        ("replace the by this", "write this in place of the"),
        lambda w: ["this" if x == "the" else x for x in w],
    ),
    (
        "that for the",
        ("replace the by that", "write that in place of the"),
        lambda w: ["that" if x == "the" else x for x in w],
    ),
    (
        "my for the",
        ("replace the by my", "write my in place of the"),
        lambda w: ["my" if x == "the" else x for x in w],
    ),
    (
        "your for the",
        ("replace the by your", "write your in place of the"),
        lambda w: ["your" if x == "the" else x for x in w],
    ),
    ("first three", ("keep only the first three words", "drop all after the third word"), lambda w: w[:3]),
    ("last two", ("keep only the last two words", "drop all but the two words at the end"), lambda w: w[-2:]),
    (
        "ends",
        ("keep only the first and the last word", "drop all between the first and last word"),
        lambda w: [w[0], w[-1]],
    ),
)

_LAST_WORDS = ("today", "again", "here", "too", "quickly", "maybe", "often", "alone", "there", "tonight")
_FIRST_WORDS = ("Yesterday", "Maybe", "Now", "Luckily", "Sadly", "Suddenly", "Well", "Soon", "Later", "Listen")


def edit_recipes() -> Iterator[Recipe]:
    """Yield word-level edits of a sentence: one alone, and pairs of them."""
    steps = _word_steps()

    for name, wordings, apply in steps:
        yield Recipe(
            "edit",
            "Sentence Editing",
            name,
            (
                f"You get a sentence without its full stop. {capitalised(wordings[0])}.",
                f"{capitalised(wordings[1])}. Leave the rest of the sentence as it is.",
                f"Copy the sentence, but {wordings[0]}.",
            ),
            partial(_edit, apply=apply),
        )

    for number, (name, wordings, apply) in enumerate(steps):
        for offset in (3, 8, 17, 26):
            other_name, other_wordings, other_apply = steps[(number + offset) % len(steps)]
            shortening = ("first three", "last two", "ends", "drop first", "drop last")
            if name in shortening or (name.startswith("thing") and other_name.startswith("thing")):
                continue
            if (
                "for the" in name + other_name
                and "the" in (name.split()[-1], other_name.split()[-1])
                and name.split()[-1] == other_name.split()[-1]
            ):
                continue

            yield Recipe(
                "edit_two",
                "Sentence Editing",
                f"{name}, then {other_name}",
                (
                    f"Edit the sentence: {wordings[0]}, then {other_wordings[0]}.",
                    f"In the sentence, first {wordings[1]}. After that {other_wordings[1]}.",
                ),
                partial(_edit_twice, apply=apply, other_apply=other_apply),
            )


def _edit(rng: Random, *, apply: Callable[[list[str]], list[str]]) -> tuple[str, str]:
    words = _sentence(rng)
    return " ".join(words), " ".join(apply(words))


def _edit_twice(
    rng: Random, *, apply: Callable[[list[str]], list[str]], other_apply: Callable[[list[str]], list[str]]
) -> tuple[str, str]:
    words = _sentence(rng)
    return " ".join(words), " ".join(other_apply(apply(words)))


def _word_steps() -> list[WordStep]:
    """Return the edits of a sentence seen as a list of words."""
    return [
        *_STEPS,
        *(
            (
                f"add {word}",
                (f"add the word {word} at the end", f"put {word} after the last word"),
                lambda w, word=word: [*w, word],
            )
            for word in _LAST_WORDS
        ),
        *(
            (
                f"start {word}",
                (f"put the word {word} at the start", f"begin with {word}"),
                lambda w, word=word: [word, *w],
            )
            for word in _FIRST_WORDS
        ),
        *(
            (
                f"name {word}",
                (f"replace the name by {word}", f"write {word} in place of the person"),
                lambda w, word=word: [word if x in NAMES else x for x in w],
            )
            for word in NAMES[::4]
        ),
        *(
            (
                f"thing {noun}",
                (f"replace the thing by {noun}", f"write {noun} in place of the object"),
                lambda w, noun=noun: [noun if x in THINGS else x for x in w],
            )
            for noun in THINGS[::9]
        ),
    ]


def _sentence(rng: Random) -> list[str]:
    """Draw a sentence of 4 to 7 words, without its full stop."""
    clause = draw_clause(rng, adjective=rng.random() < 0.6)
    words = write_clause(clause, rng.choice(("present", "past", "future"))).rstrip(".").split()
    if rng.random() < 0.4:
        words += ["on", rng.choice(DAYS)]
    return words
