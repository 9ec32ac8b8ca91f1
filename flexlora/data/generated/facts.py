"""Makes tasks that look up facts about words."""

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from flexlora.data.generated.lexicon import FACTS
from flexlora.data.generated.list_steps import STEPS
from flexlora.data.generated.recipe import FEWEST_INPUTS, MakeInstance, Recipe, capitalised

# Fact -> what the input is, what is asked for, a question and a sentence.
_FACTS: dict[str, tuple[str, str, str, str]] = {
    "sound": ("an animal", "the sound it makes", "What sound does a {key} make?", "the {key} says {value}"),
    "young": ("an animal", "the word for its young", "What is a young {key} called?", "a young {key} is a {value}"),
    "home": ("an animal", "where it lives", "Where does a {key} live?", "the {key} lives in the {value}"),
    "tint": ("a thing", "its usual colour", "What colour is a {key}?", "the {key} is {value}"),
    "workplace": ("a job", "where the person works", "Where does a {key} work?", "the {key} works at the {value}"),
    "maker": ("a thing", "the job of who makes it", "Who makes a {key}?", "the {value} makes the {key}"),
    "use": ("a tool", "what it is for, in one verb", "What do we do with a {key}?", "we {value} with the {key}"),
    "worn_on": (
        "a garment",
        "the body part it is worn on",
        "Where do you wear a {key}?",
        "the {key} is for the {value}",
    ),
    "country": ("a city", "its country", "In which country is {key}?", "{key} is in {value}"),
    "opposite": ("an adjective", "its opposite", "What is the opposite of {key}?", "{key} is not {value}"),
    "plural": ("a noun", "its plural", "How do you write more than one {key}?", "one {key}, two {value}"),
    "past": (
        "a verb",
        "its past tense",
        "What is the past tense of {key}?",
        "today they {key}, yesterday they {value}",
    ),
    "participle": ("a verb", "its past participle", "What follows have for the verb {key}?", "to {key}, have {value}"),
    "gerund": ("a verb", "its form with ing", "What is the ing form of {key}?", "to {key}, {value}"),
    "base form": (
        "a verb in the past tense",
        "its base form",
        "Which verb has the past tense {key}?",
        "{key} comes from {value}",
    ),
    "third person": (
        "a verb",
        "the form used after he or she",
        "What follows he or she for {key}?",
        "I {key}, she {value}",
    ),
    "category": ("a thing", "what kind of thing it is", "What kind of thing is a {key}?", "{key} is a kind of {value}"),
}

# Facts that are asked for together.
_PAIRS = (
    ("past", "base form"),
    ("plural", "category"),
    ("young", "sound"),
    ("workplace", "plural"),
    ("opposite", "opposite"),
    ("young", "home"),
    ("sound", "tint"),
    ("use", "category"),
    ("gerund", "past"),
    ("participle", "past"),
    ("third person", "gerund"),
    ("home", "young"),
)


def fact_recipes() -> Iterator[Recipe]:
    """Yield fact look-ups: on one word, as a question, as a sentence, on lists, and together with list steps."""
    for number, (fact, (what, value_of, question, sentence)) in enumerate(_FACTS.items()):
        table = FACTS[fact]
        keys = tuple(table)
        makes: dict[str, MakeInstance] = {
            "word": partial(_fact_of_word, table=table, keys=keys),
            "question": partial(_answer_question, table=table, keys=keys, question=question),
            "sentence": partial(_fact_sentence, table=table, keys=keys, sentence=sentence),
            "pair": partial(_word_and_fact, table=table, keys=keys),
        }
        # The base form inverts past and (mostly) participle, and the opposite inverts itself.
        if fact not in ("category", "tint", "opposite", "past", "participle", "base form"):
            makes["backwards"] = partial(_word_of_fact, table=table)
        for name, make in makes.items() if len(keys) >= FEWEST_INPUTS else ():
            yield Recipe("fact", "Word Semantics", f"{fact} of one {name}", _phrasings(what, value_of)[name], make)
        yield from _list_recipes(number, fact)


def _phrasings(what: str, value_of: str) -> dict[str, tuple[str, str]]:
    """Return the definitions for one fact, by form."""
    return {
        "word": (f"You get {what}. Write {value_of}.", f"Give {value_of}. The input is {what}."),
        "question": (
            f"Answer a question about {what} in one word: {value_of}.",
            f"The question asks for {value_of}, given {what}. Answer in one word.",
        ),
        "sentence": (
            f"You get {what}. Say {value_of} in a short sentence.",
            f"Write a short sentence that tells {value_of}. The input is {what}.",
        ),
        "pair": (
            f"You get {what}. Copy it, write a colon and then {value_of}.",
            f"Write the input, a colon, and {value_of}. The input is {what}.",
        ),
        "backwards": (
            f"You get {value_of}, for {what} you have to guess. Write that word.",
            f"Which word fits? The input tells {value_of}; answer with {what}.",
        ),
    }


def _fact_of_word(rng: Random, *, table: dict[str, str], keys: tuple[str, ...]) -> tuple[str, str]:
    key = rng.choice(keys)
    return key, table[key]


def _answer_question(rng: Random, *, table: dict[str, str], keys: tuple[str, ...], question: str) -> tuple[str, str]:
    key = rng.choice(keys)
    return question.format(key=key), table[key]


def _fact_sentence(rng: Random, *, table: dict[str, str], keys: tuple[str, ...], sentence: str) -> tuple[str, str]:
    key = rng.choice(keys)
    return key, capitalised(sentence.format(key=key, value=table[key])) + "."


def _word_and_fact(rng: Random, *, table: dict[str, str], keys: tuple[str, ...]) -> tuple[str, str]:
    key = rng.choice(keys)
    return key, f"{key}: {table[key]}"


def _word_of_fact(rng: Random, *, table: dict[str, str]) -> tuple[str, str]:
    unique = [key for key, value in table.items() if list(table.values()).count(value) == 1]
    key = rng.choice(unique)
    return table[key], key


def _list_recipes(number: int, fact: str) -> Iterator[Recipe]:
    """Yield look-ups of a fact for every word of a list, some after a step."""
    what, value_of, _, _ = _FACTS[fact]
    table = FACTS[fact]
    steps = [None, STEPS[0], STEPS[1], STEPS[2], STEPS[5], STEPS[7], STEPS[8]]
    for step in [*steps[:2], *(steps[2 + (number + k) % 5] for k in range(3))]:
        if step is None:
            phrasings = (
                f"For every word of the list, which is {what}, write {value_of}.",
                f"Each word of the list is {what}. Replace each by {value_of}.",
            )
        else:
            phrasings = (
                f"First {step.wordings[0]}. Then replace every word by {value_of}.",
                f"{capitalised(step.wordings[1])}, then write {value_of} for every word.",
            )
        yield Recipe(
            "fact_list",
            "Word Semantics",
            f"{fact} of a list; {step.name if step else 'as is'}",
            phrasings,
            partial(_facts_of_list, table=table, keys=tuple(table), apply=step.apply if step else list),
        )


def _facts_of_list(
    rng: Random, *, table: dict[str, str], keys: tuple[str, ...], apply: Callable[[list[str]], list[str]]
) -> tuple[str, str]:
    words = rng.sample(keys, rng.randint(2, 3))
    return ", ".join(words), ", ".join(table[word] for word in apply(words))


def two_fact_recipes() -> Iterator[Recipe]:
    """Yield look-ups of two facts about one word."""
    for one, other in _PAIRS:
        keys = tuple(key for key in FACTS[one] if key in FACTS[other])
        if len(keys) < FEWEST_INPUTS or one == other:
            continue

        yield Recipe(
            "fact_two",
            "Word Semantics",
            f"{one} and {other}",
            (
                f"You get {_FACTS[one][0]}. Write {_FACTS[one][1]} and {_FACTS[other][1]}, with a comma between them.",
                f"Give first {_FACTS[one][1]}, then {_FACTS[other][1]}. The input is {_FACTS[one][0]}.",
            ),
            partial(_two_facts, one=one, other=other, keys=keys),
        )


def _two_facts(rng: Random, *, one: str, other: str, keys: tuple[str, ...]) -> tuple[str, str]:
    key = rng.choice(keys)
    return key, f"{FACTS[one][key]}, {FACTS[other][key]}"
