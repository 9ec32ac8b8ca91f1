"""Makes tasks that judge what somebody says: reviews, topics of notes, and turns of small talk."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from random import Random

from flexlora.data.generated.lexicon import BLAME, CATEGORIES, NAMES, PLURAL_CATEGORIES, PRAISE, TOPICS
from flexlora.data.generated.recipe import Recipe, either
from flexlora.data.generated.scenes import DRAWS

_REVIEWS = (
    "The {noun} was {word}.",
    "What a {word} {noun}!",
    "I find this {noun} {word}.",
    "{name} says the {noun} is {word}.",
    "A {word} {noun}, I must say.",
)
_NOTES = (
    "We talked about the {a} and the {b}.",
    "The {a} is near the {b}.",
    "She wrote about a {a} and a {b}.",
    "There was no {a} and no {b}.",
)
# Intent -> what is said, and the reply.
_INTENTS: dict[str, tuple[str, str]] = {
    "order": ("I would like {dish} and {drink}, please.", "Here is your {dish} with {drink}."),
    "book": ("Can I book a table at the {place} for {day}?", "Your table at the {place} is booked for {day}."),
    "greet": ("Hello, my name is {name}.", "Nice to meet you, {name}."),
    "travel": ("How do I get to {city}?", "Take the {vehicle} to {city}."),
    "repair": ("My {thing} is broken.", "Bring the {thing} on {day}."),
    "price": ("How much is the {thing}?", "The {thing} costs {price} coins."),
    "invite": ("Do you want to play {sport} on {day}?", "Yes, {sport} on {day} sounds fine."),
    "thank": ("Thank you for the {thing}, {name}.", "You are welcome, I hope you like the {thing}."),
    "complain": ("The {dish} is cold!", "I am sorry, you will get a new {dish}."),
    "farewell": ("Goodbye, {name}, see you on {day}.", "See you on {day}!"),
}


_LABELS = (
    ("positive", "negative"),
    ("good", "bad"),
    ("happy", "unhappy"),
    ("yes", "no"),
    ("up", "down"),
    ("love", "hate"),
)


def review_recipes() -> Iterator[Recipe]:
    """Yield sentiment classification of short made-up reviews."""
    reviewed = ("dish", "drink", "garment", "vehicle", "instrument", "place", "furniture", "tool")
    for number, category in enumerate(reviewed):
        nouns, many = CATEGORIES[category], PLURAL_CATEGORIES[category]
        for place in range(3):
            good, bad = _LABELS[(number + 2 * place) % len(_LABELS)]
            yield Recipe(
                "sentiment",
                "Sentiment Analysis",
                f"{category}; {good} or {bad}",
                (
                    f"Does the writer like the {category}? Answer {good} if so and {bad} if not.",
                    f"Classify the review of a {category} as {good} or {bad}.",
                    f"Label the opinion on a {category}: {good} for praise, {bad} for blame.",
                ),
                partial(_sentiment, nouns=nouns, good=good, bad=bad),
            )
        for verb, better, make in (("like", "better", _liked), ("dislike", "worse", _disliked)):
            yield Recipe(
                "sentiment_which",
                "Sentiment Analysis",
                f"{verb}d {category}",
                (
                    f"Which of the two {many} does the writer {verb}? Write its name.",
                    f"The text compares two {many}. Write the {better} one.",
                ),
                partial(make, nouns=nouns),
            )


def _sentiment(rng: Random, *, nouns: tuple[str, ...], good: str, bad: str) -> tuple[str, str]:
    liked = rng.random() < 0.5
    text = rng.choice(_REVIEWS).format(
        noun=rng.choice(nouns), name=rng.choice(NAMES), word=rng.choice(PRAISE if liked else BLAME)
    )
    return text, good if liked else bad


def _liked(rng: Random, *, nouns: tuple[str, ...]) -> tuple[str, str]:
    one, other = rng.sample(nouns, 2)
    praise, blame = rng.choice(PRAISE), rng.choice(BLAME)
    if rng.random() < 0.5:
        return f"The {one} was {praise}, but the {other} was {blame}.", one
    return f"The {one} was {blame}, but the {other} was {praise}.", other


def _disliked(rng: Random, *, nouns: tuple[str, ...]) -> tuple[str, str]:
    text, liked = _liked(rng, nouns=nouns)
    one, other = text.split()[1], text.split("the ")[1].split()[0]
    return text, other if liked == one else one


def topic_recipes() -> Iterator[Recipe]:
    """Yield topic classification of short made-up notes, with plain labels or with letters."""
    every = list(TOPICS)
    choices = [*combinations(every, 2), *list(combinations(every, 3))[::3], *list(combinations(every, 4))[::9]]
    for number, topics in enumerate(choices):
        coded = number % 3 == 2
        names = tuple("ABCD"[: len(topics)]) if coded else topics
        rules = ", ".join(f"{label} for {topic}" for label, topic in zip(names, topics, strict=True))
        phrasings = (
            (f"What is the text about? Write {rules}.", f"Label the topic of the note with a letter: {rules}.")
            if coded
            else (
                f"What is the text about: {either(topics)}?",
                f"Classify the topic of the note as {either(topics)}.",
                f"Choose the topic of the text. The topics are {either(topics)}.",
            )
        )
        yield Recipe(
            "topic",
            "Text Categorization",
            " / ".join(f"{topic}={name}" for topic, name in zip(topics, names, strict=True)),
            phrasings,
            partial(_topic, topics=topics, names=names),
        )


def _topic(rng: Random, *, topics: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, str]:
    place = rng.randrange(len(topics))
    one, other = rng.sample(TOPICS[topics[place]], 2)
    return rng.choice(_NOTES).format(a=one, b=other), names[place]


def dialogue_recipes() -> Iterator[Recipe]:
    """Yield intents and replies for one turn of a small talk."""
    names = list(_INTENTS)
    for number, (intent, (said, reply)) in enumerate(_INTENTS.items()):
        fields = [field for field in DRAWS if "{" + field + "}" in said]
        # A reply that needs what the question does not hold would be a guess: such intents are only classified.
        if all("{" + field + "}" not in reply for field in DRAWS if field not in fields):
            yield Recipe(
                "reply",
                "Dialogue Generation",
                intent,
                (
                    f"Reply politely to the guest. The intent is: {intent}.",
                    f"Somebody wants to {intent}. Write the reply.",
                ),
                partial(_reply, said=said, reply=reply, fields=fields),
            )
        for field in fields:
            yield Recipe(
                "slot",
                "Dialogue State Tracking",
                f"{intent}; {field}",
                (
                    f"Somebody wants to {intent}. Write {field}, an equals sign and the {field} that is named.",
                    f"The speaker wants to {intent}. Fill the slot {field} in the form {field} = value.",
                ),
                partial(_slot, said=said, field=field, fields=fields),
            )
        for offsets in ((1,), (3,), (2, 5), (1, 4, 7)):
            intents = (intent, *(names[(number + offset) % len(names)] for offset in offsets))
            yield Recipe(
                "intent",
                "Intent Identification",
                " / ".join(intents),
                (f"What does the speaker want: {either(intents)}?", f"Name the intent. It is {either(intents)}."),
                partial(_intent, intents=intents),
            )


def _reply(rng: Random, *, said: str, reply: str, fields: list[str]) -> tuple[str, str]:
    values = {field: rng.choice(DRAWS[field]) for field in fields}
    return said.format(**values), reply.format(**values)


def _slot(rng: Random, *, said: str, field: str, fields: list[str]) -> tuple[str, str]:
    values = {name: rng.choice(DRAWS[name]) for name in fields}
    return said.format(**values), f"{field} = {values[field]}"


def _intent(rng: Random, *, intents: tuple[str, ...]) -> tuple[str, str]:
    chosen = rng.choice(intents)
    said = _INTENTS[chosen][0]
    return said.format(**{field: rng.choice(values) for field, values in DRAWS.items()}), chosen
