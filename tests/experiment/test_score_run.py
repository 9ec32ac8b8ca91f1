"""Runs scored again: the same scores, and settings that may change."""

import pytest

from flexlora.experiment.result import RunResult
from flexlora.experiment.run_folder import ExperimentError
from flexlora.experiment.score_run import evaluate_run


def test_scores_are_those_of_the_run(small_run: RunResult) -> None:
    scores = evaluate_run(str(small_run.folder))
    first, last = small_run.rounds[0].evaluation, small_run.rounds[-1].evaluation
    assert first is not None and last is not None
    assert scores["base model"].unseen == first.unseen
    assert scores["rank 16"].unseen.rouge_l == pytest.approx(last.unseen.rouge_l, rel=1e-4)


@pytest.mark.parametrize("overrides", [["data.test_examples_per_task=2"], {"data__test_examples_per_task": 2}])
def test_more_examples_may_be_scored(small_run: RunResult, overrides: list[str] | dict[str, object]) -> None:
    assert evaluate_run(small_run.folder, overrides, rank=1)["rank 1"].unseen.num_examples == 4


def test_settings_that_decide_the_data_are_refused(small_run: RunResult) -> None:
    with pytest.raises(ExperimentError, match=r"scoring a run again can change .*; got data\.num_unseen_tasks, seed"):
        evaluate_run(small_run.folder, {"seed": 3, "data": {"num_unseen_tasks": 5}})
    with pytest.raises(ExperimentError, match=r"the rank must be in 1\.\.16, .*; got 17"):
        evaluate_run(small_run.folder, rank=17)
