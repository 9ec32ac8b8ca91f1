"""Chooses the examples whose answers a page shows, by a rule that it states: best, worst and random."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexlora.report.answer_file import BASE, FEDERATED, AnswerRecord, ModelAnswer
from flexlora.report.scores import finite
from flexlora.text import count_text

NUM_EACH = 3
LONGEST_TEXT = 1200
"""Characters of a prompt or an answer that a page shows; `answers.jsonl` has all of it."""
FEDIT = "fedit_smallest_rank"
MODELS = {BASE: "Base model", FEDIT: "FedIT, smallest rank", FEDERATED: "This run"}
"""Models whose answers are shown, in this order."""


@dataclass(frozen=True)
class ShownAnswer:
    """What one model said; ``style`` is its key in the styles of figures."""

    model: str
    style: str
    text: str
    rouge_l: float | None


@dataclass(frozen=True)
class ShownExample:
    """One example as a page shows it; ``gain`` is in points of ROUGE-L over what the run is compared with."""

    task: str
    category: str
    prompt: str
    references: Sequence[str]
    answers: Sequence[ShownAnswer]
    gain: float


@dataclass(frozen=True)
class AnswerGroup:
    """Examples that were chosen by one rule."""

    title: str
    rule: str
    examples: Sequence[ShownExample]


def answer_groups(records: Sequence[AnswerRecord], models: Iterable[str]) -> list[AnswerGroup]:
    """Return the best, the worst and random examples, at most one of each task in a group; none without answers.

    Args:
        records: All examples.
        models: Whose answers may be shown; those of a reference that is not finished may be old.
    """
    known = [model for model in MODELS if model in set(models) | {BASE, FEDERATED}]
    present = [record for record in records if FEDERATED in record.answers and BASE in record.answers]
    if not present:
        return []
    shown = [model for model in known if all(model in record.answers for record in present)]
    other = FEDIT if FEDIT in shown else BASE
    gains = [(_gain(record, other), record) for record in present]
    among = f"of {count_text(len(present), 'example')}"
    name = MODELS[other] if other == FEDIT else "the base model"
    best = sorted((one for one in gains if one[0] > 0), key=lambda one: (-one[0], *_draw(one[1])))
    worst = sorted((one for one in gains if one[0] < 0), key=lambda one: (one[0], *_draw(one[1])))
    drawn = sorted(gains, key=lambda one: _draw(one[1]))
    groups = [
        ("Best", f"The largest gains in ROUGE-L over {name}, {among}; ties by the draw below.", best),
        ("Worst", f"The largest losses against {name}.", worst),
        ("Random", "The smallest SHA-256 of task and number, so that nobody picked them.", drawn),
    ]
    return [
        AnswerGroup(title, rule + " One of a task at most.", [_shown(gain, record, shown) for gain, record in chosen])
        for title, rule, ordered in groups
        if (chosen := _one_a_task(ordered))
    ]


def drawn_answers(records: Sequence[AnswerRecord]) -> tuple[Sequence[ShownExample], str]:
    """Return the examples that a page shows by a draw, with what base and run answered, and the rule; none without."""
    groups = answer_groups(records, ())
    return (groups[-1].examples, groups[-1].rule) if groups else ((), "")


def _one_a_task(ordered: Iterable[tuple[float, AnswerRecord]]) -> list[tuple[float, AnswerRecord]]:
    chosen: dict[str, tuple[float, AnswerRecord]] = {}
    for gain, record in ordered:
        chosen.setdefault(record.task, (gain, record))
        if len(chosen) == NUM_EACH:
            break
    return list(chosen.values())


def _gain(record: AnswerRecord, other: str) -> float:
    return finite(record.answers[FEDERATED].rouge_l - record.answers[other].rouge_l) or 0.0


def _draw(record: AnswerRecord) -> tuple[str, int]:
    key = f"{record.task} {record.number}"
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest(), record.number


def _shown(gain: float, record: AnswerRecord, models: Sequence[str]) -> ShownExample:
    return ShownExample(
        task=record.task,
        category=record.category,
        prompt=cut(record.prompt),
        references=[cut(reference) for reference in record.references[:3]],
        answers=[_answer(model, record.answers[model]) for model in models],
        gain=gain,
    )


def _answer(model: str, answer: ModelAnswer) -> ShownAnswer:
    style = "fedit" if model == FEDIT else model
    return ShownAnswer(MODELS[model], style, cut(answer.text), finite(answer.rouge_l))


def cut(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return a text short enough for a page, its middle left out."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} […] {text[-half:]}"
