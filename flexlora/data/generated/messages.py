"""Which tasks judge what somebody says: reviews, topics of notes, and turns of small talk."""

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from random import Random

from flexlora.data.generated.lexicon import BLAME, CATEGORIES, NAMES, PLURAL_CATEGORIES, PRAISE, TOPICS
from flexlora.data.generated.recipe import Recipe
from flexlora.data.generated.scenes import DRAWS


def review_recipes() -> Iterator[Recipe]:
    """Yield sentiment and topic classification of short made-up reviews and notes."""
    labels = (
        ("positive", "negative"),
        ("good", "bad"),
        ("happy", "unhappy"),
        ("yes", "no"),
        ("up", "down"),
        ("love", "hate"),
    )
    frames = (
        "The {noun} was {word}.",
        "What a {word} {noun}!",
        "I find this {noun} {word}.",
        "{name} says the {noun} is {word}.",
        "A {word} {noun}, I must say.",
    )

    def sentiment(rng: Random, *, nouns: tuple[str, ...], good: str, bad: str) -> tuple[str, str]:
        liked = rng.random() < 0.5
        text = rng.choice(frames).format(
            noun=rng.choice(nouns), name=rng.choice(NAMES), word=rng.choice(PRAISE if liked else BLAME)
        )
        return text, good if liked else bad

    def mixed(rng: Random, *, nouns: tuple[str, ...]) -> tuple[str, str]:
        one, other = rng.sample(nouns, 2)
        praise, blame = rng.choice(PRAISE), rng.choice(BLAME)
        if rng.random() < 0.5:
            return f"The {one} was {praise}, but the {other} was {blame}.", one
        return f"The {one} was {blame}, but the {other} was {praise}.", other

    def unloved(rng: Random, *, nouns: tuple[str, ...]) -> tuple[str, str]:
        text, liked = mixed(rng, nouns=nouns)
        one, other = text.split()[1], text.split("the ")[1].split()[0]
        return text, other if liked == one else one

    for number, category in enumerate(
        ("dish", "drink", "garment", "vehicle", "instrument", "place", "furniture", "tool")
    ):
        nouns = CATEGORIES[category]
        for place in range(3):
            good, bad = labels[(number + 2 * place) % len(labels)]

            yield Recipe(
                "sentiment",
                "Sentiment Analysis",
                f"{category}; {good} or {bad}",
                (
                    f"Does the writer like the {category}? Answer {good} if so and {bad} if not.",
                    f"Classify the review of a {category} as {good} or {bad}.",
                    f"Label the opinion on a {category}: {good} for praise, {bad} for blame.",
                ),
                partial(sentiment, nouns=nouns, good=good, bad=bad),
            )

        many = PLURAL_CATEGORIES[category]
        yield Recipe(
            "sentiment_which",
            "Sentiment Analysis",
            f"liked {category}",
            (
                f"Which of the two {many} does the writer like? Write its name.",
                f"The text compares two {many}. Write the better one.",
            ),
            partial(mixed, nouns=nouns),
        )
        yield Recipe(
            "sentiment_which",
            "Sentiment Analysis",
            f"disliked {category}",
            (
                f"Which of the two {many} does the writer dislike? Write its name.",
                f"The text compares two {many}. Write the worse one.",
            ),
            partial(unloved, nouns=nouns),
        )
    topics = list(TOPICS)
    note_frames = (
        "We talked about the {a} and the {b}.",
        "The {a} is near the {b}.",
        "She wrote about a {a} and a {b}.",
        "There was no {a} and no {b}.",
    )
    groups = [*combinations(topics, 2), *list(combinations(topics, 3))[::3], *list(combinations(topics, 4))[::9]]

    def topic(rng: Random, *, group: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, str]:
        place = rng.randrange(len(group))
        one, other = rng.sample(TOPICS[group[place]], 2)
        return rng.choice(note_frames).format(a=one, b=other), names[place]

    for number, group in enumerate(groups):
        coded = number % 3 == 2
        names = tuple("ABCD"[: len(group)]) if coded else group

        choices = ", ".join(group[:-1]) + " or " + group[-1]
        rules = ", ".join(f"{label} for {subject}" for label, subject in zip(names, group, strict=True))
        phrasings = (
            (f"What is the text about? Write {rules}.", f"Label the topic of the note with a letter: {rules}.")
            if coded
            else (
                f"What is the text about: {choices}?",
                f"Classify the topic of the note as {choices}.",
                f"Choose the topic of the text. The topics are {choices}.",
            )
        )
        yield Recipe(
            "topic",
            "Text Categorization",
            " / ".join(f"{s}={n}" for s, n in zip(group, names, strict=True)),
            phrasings,
            partial(topic, group=group, names=names),
        )


def dialogue_recipes() -> Iterator[Recipe]:
    """Yield intents and replies for one turn of a small talk."""
    intents: dict[str, tuple[str, str]] = {
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
    names = list(intents)

    # What the reply needs and the question does not hold would be a guess: such intents are only classified.
    def answer(rng: Random, *, said: str, reply: str, fields: list[str]) -> tuple[str, str]:
        values = {field: rng.choice(DRAWS[field]) for field in fields}
        return said.format(**values), reply.format(**values)

    def slot(rng: Random, *, said: str, field: str, fields: list[str]) -> tuple[str, str]:
        values = {name: rng.choice(DRAWS[name]) for name in fields}
        return said.format(**values), f"{field} = {values[field]}"

    def classify(rng: Random, *, group: tuple[str, ...]) -> tuple[str, str]:
        chosen = rng.choice(group)
        said = intents[chosen][0]
        return said.format(**{field: rng.choice(values) for field, values in DRAWS.items()}), chosen

    for number, (intent, (said, reply)) in enumerate(intents.items()):
        fields = [field for field in DRAWS if "{" + field + "}" in said]
        known = all("{" + field + "}" not in reply for field in DRAWS if field not in fields)
        if known:
            yield Recipe(
                "reply",
                "Dialogue Generation",
                intent,
                (
                    f"Reply politely to the guest. The intent is: {intent}.",
                    f"Somebody wants to {intent}. Write the reply.",
                ),
                partial(answer, said=said, reply=reply, fields=fields),
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
                partial(slot, said=said, field=field, fields=fields),
            )
        for offsets in ((1,), (3,), (2, 5), (1, 4, 7)):
            group = (intent, *(names[(number + offset) % len(names)] for offset in offsets))

            choices = ", ".join(group[:-1]) + " or " + group[-1]
            yield Recipe(
                "intent",
                "Intent Identification",
                " / ".join(group),
                (f"What does the speaker want: {choices}?", f"Name the intent. It is {choices}."),
                partial(classify, group=group),
            )
