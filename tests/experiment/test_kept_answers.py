"""What a run keeps of its answers: those that its scores are made of."""

import json

import pytest
from rouge_score import rouge_scorer

from flexlora.data.examples import Example
from flexlora.experiment.kept_answers import readable_prompt
from flexlora.experiment.result import RunResult


def test_the_answers_kept_are_those_that_were_scored_last(small_run: RunResult) -> None:
    lines = [json.loads(line) for line in (small_run.folder / "answers.jsonl").read_text().splitlines()]
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for model, record in (("base", small_run.rounds[0]), ("federated", small_run.rounds[-1])):
        assert record.evaluation is not None
        unseen = record.evaluation.unseen
        best = [
            100 * scorer.score_multi(line["references"], line["answers"][model]["text"])["rougeL"].fmeasure
            for line in lines
        ]
        assert len(best) == unseen.num_examples
        assert sum(best) / len(best) == pytest.approx(unseen.rouge_l)
    assert len({line["task"] for line in lines}) == 2
    assert all(line["prompt"] and line["references"] for line in lines)


def test_each_task_of_an_evaluation_is_recorded(small_run: RunResult) -> None:
    last = small_run.rounds[-1].evaluation
    assert last is not None
    total = sum(task.num_examples for task in last.tasks.values())
    assert (len(last.tasks), total) == (last.unseen.num_tasks, last.unseen.num_examples)
    mean = sum(task.rouge_l * task.num_examples for task in last.tasks.values()) / total
    assert mean == pytest.approx(last.unseen.rouge_l, abs=1e-3)


def test_a_prompt_is_read_with_its_earlier_turns() -> None:
    example = Example("And now?", "", ("yes",), (("user", "Ready?"), ("assistant", "No.")))
    assert readable_prompt(example) == "user: Ready?\n\nassistant: No.\n\nAnd now?"
