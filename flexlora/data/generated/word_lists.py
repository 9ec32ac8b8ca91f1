"""Makes tasks that reorder a list of words or pick one word from it."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, CATEGORY_OF, FACTS, NOUNS, PLURAL_CATEGORIES
from flexlora.data.generated.list_steps import PICKS, SEPARATORS, STEPS, ListStep, Pick, draw_words, mixed_words
from flexlora.data.generated.recipe import Recipe, capitalised


def _change_list(
    rng: Random, *, step: Callable[[list[str]], list[str]], separator: str, category: str | None = None
) -> tuple[str, str]:
    words = draw_words(rng, 3, 5, category)
    return separator.join(words), separator.join(step(words))


def _then(one: ListStep, other: ListStep) -> Callable[[list[str]], list[str]]:
    return lambda words: other.apply(one.apply(words))


def order_recipes() -> Iterator[Recipe]:
    """Yield reorderings of a word list: every step alone on several kinds of list, and pairs of steps."""
    for number, step in enumerate(STEPS):
        kinds = list(CATEGORIES)
        for place, (name, separator) in enumerate(list(SEPARATORS.items())[:4]):
            category = kinds[(3 * number + place) % len(kinds)] if place == 1 else None
            noun = PLURAL_CATEGORIES[category] if category else "words"
            yield Recipe(
                "list_order",
                "List Reordering",
                f"{step.name}; {noun}; {name}",
                (
                    f"You get a list of {noun} separated by {name}. {capitalised(step.wordings[0])}.",
                    f"{capitalised(step.wordings[1])}. The input is a list of {noun} with {name} between them.",
                    f"Given {noun} separated by {name}, {step.wordings[0]} and write the result in the same form.",
                ),
                partial(_change_list, step=step.apply, separator=separator, category=category),
            )
    for one in STEPS:
        for other in STEPS:
            if one is other or one.name == "first to all" or {one.name, other.name} == {"double all", "double first"}:
                continue
            if one.name in ("keep two", "keep last two", "keep ends") and other.name not in (
                "reverse",
                "double all",
                "sort",
            ):
                continue
            if one.name.startswith("drop") and other.name.startswith(("keep", "every")):
                continue
            if one.name.startswith("double") and other.name != "reverse":
                continue
            yield Recipe(
                "list_compose",
                "List Processing",
                f"{one.name}, then {other.name}",
                (
                    f"First {one.wordings[0]}. Then {other.wordings[0]}.",
                    f"Given a list of words, {one.wordings[1]} and then {other.wordings[1]}.",
                    f"{capitalised(one.wordings[0])}, then {other.wordings[1]}. Write the new list.",
                ),
                partial(_change_list, step=_then(one, other), separator=", "),
            )


def select_recipes() -> Iterator[Recipe]:
    """Yield tasks that pick one word out of a list, some after a step and some mapping the word to a fact."""
    separators = list(SEPARATORS.items())

    for number, pick in enumerate(PICKS):
        for name, separator in (separators[0], separators[1 + number % 3], separators[4 + number % 4]):
            yield Recipe(
                "select",
                "Word Selection",
                f"{pick.name}; {name}",
                (
                    f"You get words separated by {name}. Write {pick.wordings[0]}.",
                    f"Which is {pick.wordings[1]} of the list? The words are separated by {name}.",
                    f"Read the list of words with {name} between them and answer with {pick.wordings[0]} only.",
                ),
                partial(_pick, pick=pick, separator=separator),
            )

    for pick in PICKS[:5]:
        for fact, words_for_fact in _FACT_WORDINGS.items():
            keys = tuple(FACTS[fact])

            yield Recipe(
                "select_map",
                "Word Selection",
                f"{fact} of {pick.name}",
                (
                    f"Look at {pick.wordings[0]} of the list and write {words_for_fact[0]}.",
                    f"Take {pick.wordings[1]} and give {words_for_fact[1]}. Ignore the others.",
                ),
                partial(_fact_of_pick, pick=pick, fact=fact, keys=keys),
            )

    for category in CATEGORIES:
        many = PLURAL_CATEGORIES[category]
        yield Recipe(
            "select_kind",
            "Word Selection",
            f"the one {category}",
            (
                f"Only one word of the list belongs to the {many}. Write it.",
                f"Find the {category} in the list of words and write it.",
                f"Among these words, one names something of the kind: {category}. Which one is it?",
            ),
            partial(_only_one, category=category),
        )
        yield Recipe(
            "select_kind",
            "Word Selection",
            f"the one that is no {category}",
            (
                f"All words of the list belong to the {many}, except one. Write the one that does not.",
                f"Which word is the odd one out? All others are {many}.",
            ),
            partial(_odd_one, category=category),
        )


def _pick(rng: Random, *, pick: Pick, separator: str) -> tuple[str, str]:
    words = draw_words(rng, 3, 6)
    return separator.join(words), pick.apply(words)


def _fact_of_pick(rng: Random, *, pick: Pick, fact: str, keys: tuple[str, ...]) -> tuple[str, str]:
    words = rng.sample(keys, rng.randint(3, 4))
    return ", ".join(words), FACTS[fact][pick.apply(words)]


def _only_one(rng: Random, *, category: str) -> tuple[str, str]:
    words = mixed_words(rng, category, 1, 1)
    return ", ".join(words), next(word for word in words if CATEGORY_OF[word] == category)


def _odd_one(rng: Random, *, category: str) -> tuple[str, str]:
    words = rng.sample(CATEGORIES[category], rng.randint(2, 4))
    odd = rng.choice([noun for noun in NOUNS if CATEGORY_OF[noun] != category])
    words.insert(rng.randint(0, len(words)), odd)
    return ", ".join(words), odd


_FACT_WORDINGS: dict[str, tuple[str, str]] = {
    "sound": ("the sound this animal makes", "its sound"),
    "young": ("the name of its young", "the word for its baby"),
    "tint": ("its usual colour", "the colour it has"),
    "opposite": ("the word with the opposite meaning", "its opposite"),
    "plural": ("its plural", "the form for more than one"),
    "past": ("its past tense", "the past form"),
    "country": ("the country of this city", "the country it lies in"),
    "category": ("what kind of thing it is", "its category"),
}
