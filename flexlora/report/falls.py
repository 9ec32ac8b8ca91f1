"""Finds out whether a run, or a reference, ends below its best."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexlora.report.scores import finite
from flexlora.report.task_differences import task_difference
from flexlora.rounds.records import EvaluationRecord, ReferenceRunRecord, RoundRecord
from flexlora.text import number_text

LEAST_FALL = 1.0
"""Points of ROUGE-L; less is no fall worth a word."""


@dataclass(frozen=True)
class Best:
    """The best score of a run on the unseen tasks, and how it ended.

    Attributes:
        is_told: Whether the fall is worth a word: `LEAST_FALL` or more, and beyond chance over tasks if that is known.
    """

    server_round: int
    rouge_l: float
    last_round: int
    last_rouge_l: float
    is_told: bool

    @property
    def fell(self) -> float:
        """Points of ROUGE-L from the best evaluation to the last."""
        return self.rouge_l - self.last_rouge_l

    def in_words(self, subject: str = "It") -> str:
        """Return what happened in one sentence."""
        return (
            f"{subject} fell by {number_text(self.fell)} from its best: ROUGE-L {number_text(self.rouge_l)} after "
            f"round {self.server_round}, {number_text(self.last_rouge_l)} after round {self.last_round}."
        )


def best_of(records: Sequence[RoundRecord]) -> Best | None:
    """Return the best and the last evaluation of a run; None before a trained model has been scored."""
    return _best((record.server_round, record.evaluation) for record in records if record.evaluation)


def best_of_reference(reference: ReferenceRunRecord) -> Best | None:
    """Return the best and the last evaluation of a reference, without a test over tasks, which are not recorded."""
    scored = [(one.server_round, finite(one.unseen.rouge_l)) for one in reference.evaluations if one.server_round]
    present = [(number, value) for number, value in scored if value is not None]
    if not present:
        return None
    (number, top), (last, end) = max(present, key=lambda one: one[1]), present[-1]
    return Best(number, top, last, end, top - end >= LEAST_FALL)


def best_validation_round(records: Sequence[RoundRecord]) -> tuple[int, float] | None:
    """Return the round with the lowest validation loss, the first of equals, and that loss; None without any."""
    losses = [
        (loss, record.server_round)
        for record in records
        if record.evaluation and (loss := finite(record.evaluation.validation_loss)) is not None
    ]
    if not losses:
        return None
    loss, server_round = min(losses)
    return server_round, loss


def _best(evaluations: Iterable[tuple[int, EvaluationRecord | None]]) -> Best | None:
    scored = [
        (number, value, evaluation)
        for number, evaluation in evaluations
        if number and evaluation and (value := finite(evaluation.unseen.rouge_l)) is not None
    ]
    if not scored:
        return None
    (number, top, best), (last, end, final) = max(scored, key=lambda one: one[1]), scored[-1]
    difference = task_difference(final.tasks, best.tasks)
    beyond_chance = difference is None or difference.high < 0
    return Best(number, top, last, end, top - end >= LEAST_FALL and beyond_chance)
