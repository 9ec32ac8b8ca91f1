"""Finds scores in the records of a run, and compares them where both are there and finite."""

import math
from collections.abc import Iterable, Sequence

from flexlora.rounds.records import EvaluationRecord, ReferencesRecord, RoundRecord, ScoreRecord


def base_evaluation(records: Sequence[RoundRecord], references: ReferencesRecord) -> EvaluationRecord | None:
    """Return how the base model alone does: the reference, or else what round 0 measured."""
    if references.base:
        return references.base
    return records[0].evaluation if records and records[0].server_round == 0 else None


def last_evaluated(records: Sequence[RoundRecord]) -> RoundRecord | None:
    """Return the last round that was evaluated."""
    return next((record for record in reversed(records) if record.evaluation), None)


def federated_evaluation(records: Sequence[RoundRecord]) -> EvaluationRecord | None:
    """Return the last evaluation of a trained model; None while only the base model has been scored."""
    last = last_evaluated(records)
    return last.evaluation if last and last.server_round > 0 else None


def pooled_rouge_l(scores: Iterable[ScoreRecord | None]) -> float | None:
    """Return the mean ROUGE-L weighted by examples, leaving out what is missing or not finite."""
    present = [score for score in scores if score and math.isfinite(score.rouge_l) and score.num_examples]
    weight = sum(score.num_examples for score in present)
    return sum(score.rouge_l * score.num_examples for score in present) / weight if weight else None


def rouge_l_of(score: ScoreRecord | None) -> float | None:
    """Return the ROUGE-L of a score, or None if it is missing or not finite."""
    return finite(score.rouge_l) if score else None


def difference(value: float | None, other: float | None) -> float | None:
    """Return ``value - other``, or None if either is missing or not finite."""
    return finite(value - other) if value is not None and other is not None else None


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else None
