"""A run that ends below its best says so, and chance does not."""

import pytest

from flexlora.report.falls import best_of, best_of_reference, best_validation_round
from flexlora.rounds.records import (
    EvaluationRecord,
    ReferenceRunRecord,
    RoundRecord,
    RoundScoreRecord,
    ScoreRecord,
    TaskScoreRecord,
)


def score(rouge_l: float) -> ScoreRecord:
    return ScoreRecord(rouge_l=rouge_l, exact_match=0, loss=1, num_examples=8, num_tasks=8)


def record(number: int, *tasks: float, loss: float | None = None) -> RoundRecord:
    own = score(sum(tasks) / len(tasks))
    by_task = {f"{place}": TaskScoreRecord(rouge_l=value, num_examples=1) for place, value in enumerate(tasks)}
    evaluation = EvaluationRecord(unseen=own, unseen_unweighted=own, tasks=by_task, validation_loss=loss)
    return RoundRecord(server_round=number, evaluation=evaluation)


def test_a_fall_of_every_task_is_told() -> None:
    best = best_of([record(0, *[90.0] * 8), record(2, *[40.0] * 8), record(4, *[31.6] * 8)])
    assert best is not None and best.is_told
    assert best.in_words() == ("It fell by 8.4 from its best: ROUGE-L 40.0 after round 2, 31.6 after round 4.")


def test_a_fall_of_one_task_in_eight_may_be_chance() -> None:
    best = best_of([record(1, *[40.0] * 8), record(2, 0.0, *[41.0] * 7)])
    assert best is not None and not best.is_told
    assert best.fell == pytest.approx(40 - 41 * 7 / 8)


def test_less_than_a_point_is_no_fall_and_the_base_is_no_best() -> None:
    best = best_of([record(0, *[99.0] * 8), record(1, *[40.0] * 8), record(2, *[39.5] * 8)])
    assert best is not None and not best.is_told and best.server_round == 1
    assert best_of([record(0, 1.0)]) is None and best_of([]) is None


def test_a_reference_falls_too() -> None:
    evaluations = [RoundScoreRecord(server_round=n, unseen=score(value)) for n, value in ((0, 50), (3, 20), (6, 11))]
    best = best_of_reference(ReferenceRunRecord(rank="1", evaluations=evaluations))
    assert best is not None and best.is_told and best.fell == pytest.approx(9)
    assert best_of_reference(ReferenceRunRecord(rank="1")) is None


def test_the_best_round_is_that_of_the_lowest_validation_loss_not_of_the_highest_score() -> None:
    records = [record(0, 1.0, loss=3.0), record(1, 90.0, loss=2.0), record(2, 5.0, loss=1.5), record(3, 9.0, loss=1.5)]
    assert best_validation_round(records) == (2, 1.5)
    assert best_validation_round([record(1, 1.0)]) is None
