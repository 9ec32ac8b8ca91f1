"""Keeps the answers behind each score of the unseen tasks in the folder of a run."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flexlora.data.examples import Example
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.scoring import OnAnswers, unseen_tasks
from flexlora.federation.messages import Broadcast
from flexlora.report.answer_file import ANSWERS_FILE, BASE, AnswerRecord, ModelAnswer, read_answers, write_answers
from flexlora.training.evaluation import Answer

log = logging.getLogger(__name__)


def answer_keeper(loaded: LoadedRun, folder: Path, model: str) -> OnAnswers:
    """Return what a scorer tells its answers to: they replace those of ``model``, or of the base, in ``answers.jsonl``.

    Where the configuration keeps no answers, nothing is written.
    """

    def keep(adapter: Broadcast | None, answers: Mapping[str, Sequence[Answer]]) -> None:
        """Write the answers of one scoring."""
        if loaded.config.evaluation.keep_answers:
            said = [_answer(one) for own in answers.values() for one in own]
            write_answers(folder / ANSWERS_FILE, _examples(loaded), {BASE if adapter is None else model: said})

    return keep


def tell_of_lost_answers(loaded: LoadedRun, folder: Path, models: Iterable[str]) -> None:
    """Log a warning if answers that the run has kept are not in its folder any more.

    Args:
        loaded: The run.
        folder: Its folder.
        models: Whose answers it must have kept.
    """
    if not loaded.config.evaluation.keep_answers:
        return
    examples, path = _examples(loaded), folder / ANSWERS_FILE
    kept = {(one.task, one.number, one.prompt): one.answers for one in read_answers(path, damaged_is_none=True)}
    found = [kept.get((one.task, one.number, one.prompt), {}) for one in examples]
    lost = [model for model in models if not all(model in answers for answers in found)]
    if lost:
        log.warning(
            "%s has lost answers of %s, so the report cannot show them all; scores and adapters are not touched. Put "
            "a copy of the file back, or let a run start anew to have them",
            path,
            ", ".join(lost),
        )


def _examples(loaded: LoadedRun) -> list[AnswerRecord]:
    """Return the examples that scores of unseen tasks are about, in the order in which they are scored."""
    unseen = loaded.participants.corpus.unseen
    return [
        AnswerRecord(
            task=task,
            category=unseen[task].category,
            number=number,
            prompt=readable_prompt(example),
            references=list(example.outputs),
        )
        for task, examples in unseen_tasks(loaded).items()
        for number, example in enumerate(examples)
    ]


def readable_prompt(example: Example) -> str:
    """Return what a person reads as the prompt: earlier turns, instruction and input, whatever the template."""
    turns = [f"{turn[0]}: {turn[1]}" for turn in example.history]
    return "\n\n".join(part for part in (*turns, example.instruction, example.input) if part)


def _answer(answer: Answer) -> ModelAnswer:
    return ModelAnswer(text=answer.text, rouge_l=answer.rouge_l, exact_match=answer.is_exact)
