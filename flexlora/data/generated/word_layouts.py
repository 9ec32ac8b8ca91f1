"""Makes tasks that write the words of a list in another layout."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import NUMBER_WORDS, ORDINALS
from flexlora.data.generated.list_steps import SEPARATORS, STEPS, ListStep, draw_words
from flexlora.data.generated.recipe import Recipe, capitalised

# Writes words in one layout.
Write = Callable[[list[str]], str]

_LAYOUTS: dict[str, tuple[str, Write]] = {
    "numbers": (
        "number the words as in 1. apple 2. pear",
        lambda w: " ".join(f"{i}. {x}" for i, x in enumerate(w, 1)),
    ),
    "brackets": ("put square brackets around the list", lambda w: "[" + ", ".join(w) + "]"),
    "quotes": ("put every word in double quotes", lambda w: ", ".join(f'"{x}"' for x in w)),
    "stars": ("put a star before every word", lambda w: " ".join(f"* {x}" for x in w)),
    "and": (
        "write it as a phrase with the word and before the last",
        lambda w: ", ".join(w[:-1]) + " and " + w[-1],
    ),
    "or": ("join all words with the word or", lambda w: " or ".join(w)),
    "then": ("join all words with the word then", lambda w: " then ".join(w)),
    "the": ("write the word the before every word", lambda w: ", ".join(f"the {x}" for x in w)),
    "my": ("write the word my before every word", lambda w: ", ".join(f"my {x}" for x in w)),
    "sentence": (
        "write the sentence that says you see them",
        lambda w: "I see " + ", ".join(w[:-1]) + " and " + w[-1] + ".",
    ),
    "basket": (
        "say in a sentence that they are in the basket",
        lambda w: "The " + ", the ".join(w[:-1]) + " and the " + w[-1] + " are in the basket.",
    ),
    "count": (
        "write how many words there are, a colon and the words",
        lambda w: f"{NUMBER_WORDS[len(w)]}: " + ", ".join(w),
    ),
    "capitals": ("start every word with a capital letter", lambda w: ", ".join(map(capitalised, w))),
    "ordinals": (
        "write first, second and so on before the words",
        lambda w: ", ".join(f"{o} {x}" for o, x in zip(ORDINALS, w, strict=False)),
    ),
    **{name: (f"separate the words by {name}", lambda w, s=s: s.join(w)) for name, s in SEPARATORS.items()},
}


def format_recipes() -> Iterator[Recipe]:
    """Yield tasks that write the same words in another layout."""
    for number, (target, (wording, write)) in enumerate(_LAYOUTS.items()):
        sources = [item for item in SEPARATORS.items() if item[0] != target]
        for name, separator in (sources[number % 3], sources[3 + number % 2], sources[5 + number % 2]):
            yield Recipe(
                "format",
                "Text Formatting",
                f"{name} to {target}",
                (
                    f"The words are separated by {name}. {capitalised(wording)}.",
                    f"Change the layout of a list with {name}: {wording}.",
                    f"Rewrite the list, in which {name} stand between the words, so that you {wording}.",
                ),
                partial(_change_layout, separator=separator, write=write),
            )
        for step in (STEPS[0], STEPS[(number * 5 + 2) % len(STEPS)]):
            if step.name.startswith(("first", "keep", "every")) or (target == "commas" and step.name == "reverse"):
                continue

            yield Recipe(
                "format_compose",
                "Text Formatting",
                f"{step.name}; to {target}",
                (
                    f"First {step.wordings[0]}. Then {wording}.",
                    f"{capitalised(step.wordings[1])}, and after that {wording}.",
                ),
                partial(_step_and_layout, step=step, write=write),
            )


def _change_layout(rng: Random, *, separator: str, write: Write) -> tuple[str, str]:
    words = draw_words(rng, 3, 4)
    return separator.join(words), write(words)


def _step_and_layout(rng: Random, *, step: ListStep, write: Write) -> tuple[str, str]:
    words = draw_words(rng, 3, 4)
    return ", ".join(words), write(step.apply(words))
