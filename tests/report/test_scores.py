"""Scores found and compared, by hand."""

import math
from collections.abc import Callable

import pytest

from flexlora.report.scores import (
    base_evaluation,
    difference,
    federated_evaluation,
    finite,
    last_evaluated,
    pooled_rouge_l,
)
from flexlora.rounds.records import EvaluationRecord, ReferencesRecord, RoundRecord, ScoreRecord


def score(rouge_l: float, num_examples: int) -> ScoreRecord:
    return ScoreRecord(rouge_l=rouge_l, exact_match=0, loss=1, num_examples=num_examples, num_tasks=1)


def test_the_base_is_the_reference_or_else_round_0(
    records: list[RoundRecord], evaluation_of: Callable[..., EvaluationRecord]
) -> None:
    other = evaluation_of(7.0)
    assert base_evaluation(records, ReferencesRecord(base=other)) is other
    assert base_evaluation(records, ReferencesRecord()) is records[0].evaluation
    assert base_evaluation(records[1:], ReferencesRecord()) is None
    assert base_evaluation([], ReferencesRecord()) is None


def test_the_federated_evaluation_is_the_last_after_round_0(records: list[RoundRecord]) -> None:
    # Round 4 was not evaluated.
    assert last_evaluated(records[:5]) is records[3]
    assert federated_evaluation(records[:5]) is records[3].evaluation
    assert last_evaluated(records[:1]) is records[0]
    assert federated_evaluation(records[:1]) is None
    assert federated_evaluation([]) is None


def test_pooled_scores_are_weighted_by_examples_and_leave_out_what_is_missing() -> None:
    scores = [score(10, 1), score(40, 3), None, score(math.nan, 5), score(99, 0)]
    assert pooled_rouge_l(scores) == pytest.approx((10 + 3 * 40) / 4)
    assert pooled_rouge_l([None]) is None


def test_differences_need_both_sides_finite() -> None:
    assert difference(3.0, 1.0) == 2.0
    assert [difference(None, 1.0), difference(1.0, None), difference(math.inf, 1.0), finite(math.nan)] == [None] * 4
