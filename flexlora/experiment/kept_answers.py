"""Keeps the answers behind each score of the unseen tasks in the folder of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flexlora.data.examples import Example
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.scoring import OnAnswers, unseen_tasks
from flexlora.federation.messages import Broadcast
from flexlora.report.answer_file import ANSWERS_FILE, BASE, AnswerRecord, ModelAnswer, write_answers
from flexlora.training.evaluation import Answer


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
