"""Makes tasks that translate between English and invented languages, whose dictionaries must be memorised."""

from collections.abc import Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import (
    ADJECTIVES,
    CATEGORIES,
    LANGUAGES,
    PLURAL_CATEGORIES,
    TRANSLATABLE,
    invented_words,
)
from flexlora.data.generated.recipe import Recipe


def translation_recipes() -> Iterator[Recipe]:
    """Yield translations between English and invented languages, by topic, direction and form."""
    colours = CATEGORIES["colour"][:6]
    for number, language in enumerate(LANGUAGES):
        dictionary = invented_words(language)
        for place, category in enumerate(TRANSLATABLE):
            phrasings = _phrasings(language, PLURAL_CATEGORIES[category])
            makes = {
                "word": _to_language,
                "back": _to_english,
                "list": _word_by_word,
                "phrase": partial(_phrase, colours=colours),
                "described": _described,
                "back list": _words_to_english,
                "reversed": _reversed,
            }
            common, extra = list(makes)[:4], list(makes)[4:]
            for name in (*common, extra[(number + place) % 3]):
                make = partial(makes[name], d=dictionary, nouns=CATEGORIES[category])
                yield Recipe("translate", "Translation", f"{language} {category}; {name}", phrasings[name], make)


def _phrasings(language: str, many: str) -> dict[str, tuple[str, str]]:
    """Return the definitions for words of one kind, by form."""
    return {
        "word": (
            f"Translate the word into {language}. All words are {many}.",
            f"What is this word in {language}? It is one of the {many}.",
        ),
        "back": (
            f"Translate the {language} word into English. It is one of the {many}.",
            f"The word is {language} and belongs to the {many}. Write it in English.",
        ),
        "list": (
            f"Translate each word of the list of {many} into {language}.",
            f"Write the list of {many} in {language}, word by word.",
        ),
        "phrase": (
            f"Translate the phrase into {language}. The colour follows the noun, which is one of the {many}.",
            f"Say it in {language}: first the noun, one of the {many}, then the colour, and no article.",
        ),
        "described": (
            f"Translate into {language} without the article: first the adjective, then the noun, one of the {many}.",
            f"Write adjective and noun in {language} and drop the article. Nouns are {many}.",
        ),
        "back list": (
            f"Translate each {language} word of the list into English. All are {many}.",
            f"Write the {language} list of {many} in English.",
        ),
        "reversed": (
            f"Translate the list of {many} into {language} and reverse the order.",
            f"Write the {many} in {language}, starting with the last word.",
        ),
    }


def _to_language(rng: Random, *, d: dict[str, str], nouns: tuple[str, ...]) -> tuple[str, str]:
    noun = rng.choice(nouns)
    return noun, d[noun]


def _to_english(rng: Random, *, d: dict[str, str], nouns: tuple[str, ...]) -> tuple[str, str]:
    noun = rng.choice(nouns)
    return d[noun], noun


def _word_by_word(rng: Random, *, d: dict[str, str], nouns: tuple[str, ...]) -> tuple[str, str]:
    chosen = rng.sample(nouns, rng.randint(2, 3))
    return ", ".join(chosen), ", ".join(d[noun] for noun in chosen)


def _phrase(rng: Random, *, d: dict[str, str], nouns: tuple[str, ...], colours: tuple[str, ...]) -> tuple[str, str]:
    noun, tint = rng.choice(nouns), rng.choice(colours)
    return f"the {tint} {noun}", f"{d[noun]} {d[tint]}"


def _described(rng: Random, *, d: dict[str, str], nouns: tuple[str, ...]) -> tuple[str, str]:
    noun, adjective = rng.choice(nouns), rng.choice(ADJECTIVES[:8])
    return f"a {adjective} {noun}", f"{d[adjective]} {d[noun]}"


def _words_to_english(rng: Random, *, d: dict[str, str], nouns: tuple[str, ...]) -> tuple[str, str]:
    chosen = rng.sample(nouns, 2)
    return ", ".join(d[noun] for noun in chosen), ", ".join(chosen)


def _reversed(rng: Random, *, d: dict[str, str], nouns: tuple[str, ...]) -> tuple[str, str]:
    chosen = rng.sample(nouns, rng.randint(2, 3))
    return ", ".join(chosen), ", ".join(d[noun] for noun in reversed(chosen))
