"""How a comparison scores methods whose clients keep a part of their models."""

import dataclasses
from typing import Any

import pytest
import torch

from flexlora.experiment.compare_arms import Arm
from flexlora.experiment.compare_draws import Draws
from flexlora.experiment.compare_jobs import Job
from flexlora.experiment.compare_run import run_job
from flexlora.experiment.compare_study import make_study

OVERRIDES = (
    "data.num_clients=4",
    "data.num_unseen_tasks=1",
    "data.examples_per_task=12",
    "data.test_examples_per_task=1",
    "data.validation_examples=4",
    "rounds.num_rounds=1",
    "rounds.cohort_size=4",
    "training.max_steps=2",
    "model.num_threads=1",
)

STUDY = make_study(
    "configs/demo.yaml",
    OVERRIDES,
    (Arm("fedsa_lora", method={"name": "fedsa_lora"}),),
    distributions=("uniform",),
    draws=1,
    tuning_draws=1,
    trials=1,
    learning_rate=1e-3,
    evaluations=1,
    text=False,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, float], dict[str, Any]]:
    """Rows by phase, arm and learning rate."""
    threads, draws = torch.get_num_threads(), Draws(STUDY)
    job = Job("test", 0, 1000, "uniform", "base", 0.0)
    jobs = [job, dataclasses.replace(job, arm="fedsa_lora", learning_rate=0.01)]
    jobs += [dataclasses.replace(jobs[1], phase="tuning", learning_rate=rate) for rate in (1e-4, 0.01)]
    folder = tmp_path_factory.mktemp("jobs")
    found = {(j.phase, j.arm, j.learning_rate): run_job(STUDY, j, draws, folder / str(i)) for i, j in enumerate(jobs)}
    torch.set_num_threads(threads)
    return found


def test_a_client_is_scored_with_the_factor_that_it_keeps(rows: dict[tuple[str, str, float], dict[str, Any]]) -> None:
    base, own = rows["test", "base", 0.0], rows["test", "fedsa_lora", 0.01]
    assert own["failure"] is None
    # The model that all share has a zero B, so it is the base on tasks of nobody.
    assert own["unseen"]["loss"] == pytest.approx(base["unseen"]["loss"], rel=1e-6)
    assert own["own_loss"] < base["own_loss"] - 0.05


def test_a_learning_rate_is_chosen_by_what_clients_run(rows: dict[tuple[str, str, float], dict[str, Any]]) -> None:
    timid, bold = rows["tuning", "fedsa_lora", 1e-4], rows["tuning", "fedsa_lora", 0.01]
    assert bold["validation_loss"] < timid["validation_loss"] - 0.05
