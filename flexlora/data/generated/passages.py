"""Makes tasks that read a tiny passage: questions, extraction, titles, key words and checks of claims."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, permutations
from random import Random

from flexlora.data.generated.lexicon import CATEGORIES, NOUNS
from flexlora.data.generated.recipe import Recipe, capitalised
from flexlora.data.generated.scenes import DRAWS, SCENES, Scene, draw_scene, spoken


def comprehension_recipes() -> Iterator[Recipe]:
    """Yield questions on one or two sentences, answered with a word of the text."""

    for scene in SCENES:
        fields = list(scene.questions)

        yield Recipe(
            "reading",
            "Question Answering",
            f"{scene.name}; any question",
            (
                f"Read the sentence about a {scene.name} and answer the question with one word.",
                f"A {scene.name} is described and a question is asked. Answer with a word from the text.",
            ),
            partial(_any_question, scene=scene, fields=fields),
        )
        for place, field in enumerate(fields):
            take_first = place % 2 == 0

            yield Recipe(
                "reading",
                "Question Answering",
                f"{scene.name}; {field}",
                (
                    f"Answer the question about the {scene.name}: it asks for {spoken(field)}.",
                    f"Read about a {scene.name}. Give {spoken(field)} that the question asks for.",
                ),
                partial(_one_question, scene=scene, field=field),
            )
            yield Recipe(
                "reading_sentence",
                "Question Answering",
                f"{scene.name}; {field}; sentence",
                (
                    f"A question about {spoken(field)} and a sentence on a {scene.name} follow. "
                    f"Answer in the form: It is ...",
                    f"Answer the question on {spoken(field)} of the {scene.name} "
                    f"with a sentence that starts with It is.",
                ),
                partial(_answer_in_sentence, scene=scene, field=field),
            )
            which = "first" if take_first else "second"
            yield Recipe(
                "reading_two",
                "Question Answering",
                f"{scene.name}; {field} of the {which} of two",
                (
                    f"Two sentences tell of a {scene.name} each. Write {spoken(field)} of the {which}.",
                    f"Give {spoken(field)} in the {which} sentence. Both are about a {scene.name}.",
                ),
                partial(_field_of_two, scene=scene, field=field, take_first=take_first),
            )


def _any_question(rng: Random, *, scene: Scene, fields: list[str]) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    field = rng.choice(fields)
    return f"{scene.sentence.format(**values)} {scene.questions[field].format(**values)}", values[field]


def _one_question(rng: Random, *, scene: Scene, field: str) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return f"{scene.sentence.format(**values)} {scene.questions[field].format(**values)}", values[field]


def _answer_in_sentence(rng: Random, *, scene: Scene, field: str) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return (
        f"{scene.questions[field].format(**values)} {scene.sentence.format(**values)}",
        f"It is {values[field]}.",
    )


def _field_of_two(rng: Random, *, scene: Scene, field: str, take_first: bool) -> tuple[str, str]:
    first, second = draw_scene(rng, scene), draw_scene(rng, scene)
    texts = [scene.sentence.format(**first), scene.sentence.format(**second)]
    return " ".join(texts), (first if take_first else second)[field]


def extraction_recipes() -> Iterator[Recipe]:
    """Yield extraction of one, two or all fields of a sentence into several layouts."""
    layouts: tuple[tuple[str, str, Callable[[list[str], list[str]], str]], ...] = (
        ("comma", "with a comma between", lambda keys, values: ", ".join(values)),
        (
            "pairs",
            "each after its name and a colon",
            lambda keys, values: "; ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True)),
        ),
        ("arrow", "with an arrow between", lambda keys, values: " -> ".join(values)),
        ("brackets", "in round brackets", lambda keys, values: "(" + ", ".join(values) + ")"),
        ("slash", "with a slash between", lambda keys, values: " / ".join(values)),
    )

    for number, scene in enumerate(SCENES):
        fields = list(scene.questions)
        for field in fields:
            yield Recipe(
                "extract",
                "Information Extraction",
                f"{scene.name}; {field}",
                (
                    f"Write {spoken(field)} in the sentence about a {scene.name}.",
                    f"From the text on a {scene.name}, extract {spoken(field)}.",
                    f"Find {spoken(field)} in the text and write only that. The text tells of a {scene.name}.",
                ),
                partial(_one_field, scene=scene, field=field),
            )
        for place, pair in enumerate(list(permutations(fields, 2))[number % 2 :: 3]):
            layout, how, write = layouts[(number + place) % len(layouts)]

            yield Recipe(
                "extract_two",
                "Information Extraction",
                f"{scene.name}; {pair[0]} and {pair[1]}; {layout}",
                (
                    f"Write {spoken(pair[0])} and {spoken(pair[1])} of the {scene.name}, {how}.",
                    f"From the sentence on a {scene.name}, extract {spoken(pair[0])}, then {spoken(pair[1])}, {how}.",
                ),
                partial(_two_fields, scene=scene, pair=pair, write=write),
            )


def _one_field(rng: Random, *, scene: Scene, field: str) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), values[field]


def _two_fields(
    rng: Random, *, scene: Scene, pair: tuple[str, str], write: Callable[[list[str], list[str]], str]
) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), write(list(pair), [values[field] for field in pair])


def question_recipes() -> Iterator[Recipe]:
    """Yield question generation: write the question whose answer is a given field."""

    for scene in SCENES:
        for field in scene.questions:
            yield Recipe(
                "ask",
                "Question Generation",
                f"{scene.name}; {field}",
                (
                    f"Write a question about the {scene.name} that is answered by {spoken(field)}.",
                    f"Ask for {spoken(field)} in the sentence about a {scene.name}.",
                ),
                partial(_question, scene=scene, field=field),
            )
            yield Recipe(
                "ask_answer",
                "Question Generation",
                f"{scene.name}; {field}; with answer",
                (
                    f"Write a question about the {scene.name} that asks for {spoken(field)}, and then the answer.",
                    f"Ask for {spoken(field)} of the {scene.name} and answer your question in one word.",
                ),
                partial(_question_and_answer, scene=scene, field=field),
            )


def _question(rng: Random, *, scene: Scene, field: str) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), scene.questions[field].format(**values)


def _question_and_answer(rng: Random, *, scene: Scene, field: str) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), f"{scene.questions[field].format(**values)} {capitalised(values[field])}."


def title_recipes() -> Iterator[Recipe]:
    """Yield titles, headlines and keywords for the sentences of the scenes and reports."""

    for scene in SCENES:
        fields = list(scene.questions)
        for place, pair in enumerate(list(combinations(fields, 2))[::2]):
            if place % 2 == 0:
                yield Recipe(
                    "keywords",
                    "Keyword Tagging",
                    f"{scene.name}; {pair[0]} and {pair[1]}",
                    (
                        f"Tag the text on a {scene.name} with two hash tags: {spoken(pair[0])} and {spoken(pair[1])}.",
                        f"Write {spoken(pair[0])} and {spoken(pair[1])} of the {scene.name}, each after a hash sign.",
                    ),
                    partial(_keywords, scene=scene, pair=pair),
                )
            else:
                yield Recipe(
                    "title",
                    "Title Generation",
                    f"{scene.name}; {pair[0]} and {pair[1]}",
                    (
                        f"Write a title: {capitalised(scene.name)}, a colon, then "
                        f"{spoken(pair[0])} and {spoken(pair[1])}.",
                        f"Give the text a title that starts with {capitalised(scene.name)} and names {spoken(pair[0])} "
                        f"and {spoken(pair[1])}.",
                    ),
                    partial(_title, scene=scene, pair=pair),
                )


def _keywords(rng: Random, *, scene: Scene, pair: tuple[str, str]) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), "#" + " #".join(values[field] for field in pair)


def _title(rng: Random, *, scene: Scene, pair: tuple[str, str]) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    return scene.sentence.format(**values), (
        f"{capitalised(scene.name)}: " + " and ".join(capitalised(values[field]) for field in pair)
    )


def verify_recipes() -> Iterator[Recipe]:
    """Yield true-or-false tasks on a sentence and a claim, or on a list and a word."""
    answers = (("true", "false"), ("yes", "no"), ("right", "wrong"), ("entailed", "contradicted"))

    for number, scene in enumerate(SCENES):
        for place, field in enumerate(scene.questions):
            good, bad = answers[(number + place) % len(answers)]

            yield Recipe(
                "verify",
                "Textual Entailment",
                f"{scene.name}; {field}; {good} or {bad}",
                (
                    f"A {scene.name}, a question about {spoken(field)} and an answer follow. "
                    f"Is the answer {good} or {bad}?",
                    f"Check the answer given for {spoken(field)} of the {scene.name}. Write {good} or {bad}.",
                ),
                partial(_claim, scene=scene, field=field, good=good, bad=bad),
            )

    for category in CATEGORIES:
        yield Recipe(
            "verify_list",
            "Answer Verification",
            f"contains the {category}",
            (
                f"Is the {category} before the colon in the list after it? Answer yes or no.",
                f"A {category}, a colon and a list are given. Say yes if the list has the {category}, else no.",
            ),
            partial(_contained, category=category),
        )


def _claim(rng: Random, *, scene: Scene, field: str, good: str, bad: str) -> tuple[str, str]:
    values = draw_scene(rng, scene)
    holds = rng.random() < 0.5
    value = values[field] if holds else rng.choice([v for v in DRAWS[field] if v != values[field]])
    return (
        f"{scene.sentence.format(**values)} {scene.questions[field].format(**values)} {capitalised(value)}.",
        (good if holds else bad),
    )


def _contained(rng: Random, *, category: str) -> tuple[str, str]:
    words = rng.sample(NOUNS, 4)
    inside = rng.random() < 0.5
    asked = rng.choice(CATEGORIES[category])
    if inside and asked not in words:
        words[rng.randrange(4)] = asked
    return f"{asked}: " + ", ".join(words), "yes" if asked in words else "no"
