"""What a run keeps of its answers: those that its scores are made of."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from rouge_score import rouge_scorer

from flexlora.data.examples import Example
from flexlora.experiment.kept_answers import readable_prompt
from flexlora.experiment.result import RunResult
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import read_run_config


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


@pytest.mark.parametrize("damage", ["none", "gone", "half", "one model"])
def test_answers_that_are_lost_are_said_when_a_run_is_resumed(
    small_run: RunResult, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder)
    path = folder / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    elif damage == "half":
        path.write_text("".join(lines[: len(lines) // 2]))
    elif damage == "one model":
        records = [{**json.loads(line), "digest": None} for line in lines]
        for record in records:
            del record["digest"], record["answers"]["base"]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with caplog.at_level(logging.WARNING):
        run_experiment(read_run_config(folder), folder, resume=True)
    lost = {"none": "", "one model": "lost answers of base, so"}.get(damage, "lost answers of base, federated")
    assert lost in caplog.text and ("has lost" in caplog.text) == bool(lost)
