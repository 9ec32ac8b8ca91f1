"""The work of a run is counted beforehand as it is done, references and final scores included."""

from collections import Counter
from pathlib import Path

import pytest

from flexlora.experiment.config_sources import config_from
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.run import run_experiment
from flexlora.experiment.stages import Scoring, Stage
from flexlora.experiment.work_left import ALONE, ROUNDS, planned_work, remaining_work
from flexlora.rounds.loop_parts import RoundEvent

SMALL = {
    "model": {"num_threads": 1, "num_processes": 1},
    "data": {"num_clients": 8, "examples_per_task": 20, "num_unseen_tasks": 3, "test_examples_per_task": 2},
    "clients": {"counts": {"type1": 3, "type2": 0, "type3": 2, "type4": 3}},
    "rounds": {"num_rounds": 5, "cohort_size": 4},
    "training": {"max_steps": 1},
    "evaluation": {
        "every": 2,
        "max_new_tokens": 2,
        "local_only_clients": 2,
        "local_only_epochs": 0.1,
        "rank_group_clients": 2,
        "fedit_reference": True,
        "fedit_largest_reference": True,
        "large_alone_reference": True,
    },
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Counter[str]], LoadedRun, Path]:
    """Return stage -> trainings and answers counted while a run goes on, with the run."""
    config, folder = config_from("demo", SMALL), tmp_path_factory.mktemp("work") / "run"
    stages: list[tuple[str, Counter[str]]] = []

    def count(event: object) -> None:
        if isinstance(event, Stage):
            stages.append((event.title, Counter()))
        elif isinstance(event, Scoring):
            stages[-1][1]["answers"] += event.num_answers if event.done == event.num_answers else 0
        elif isinstance(event, RoundEvent) and event.kind == "client":
            stages[-1][1]["trainings"] += 1

    run_experiment(config, folder, notify=count)
    loaded = LoadedRun.load(config, gather_participants(config))
    return dict(stages), loaded, folder


def test_plan_and_run_agree(counted: tuple[dict[str, Counter[str]], LoadedRun, Path]) -> None:
    stages, loaded, _ = counted
    planned = planned_work(loaded)
    names = {
        ROUNDS: "Federated rounds (aligned)",
        ALONE: "Reference: 2 sampled clients train alone",
        "fedit_smallest_rank": "Reference: FedIT, every client at the smallest rank",
        "fedit_largest_rank": "Reference: FedIT, every client at the largest rank",
        "large_clients_alone": "Reference: FedIT, large clients alone",
    }
    assert planned.keys() == names.keys()
    for name, title in names.items():
        assert (planned[name].trainings, planned[name].answers) == (
            stages[title]["trainings"],
            stages[title]["answers"],
        )
    # By hand: 5 rounds of 4; evaluations of 3 tasks with 2 examples before round 1 and after rounds 2, 4 and 5.
    assert planned[ROUNDS].trainings == 20 and planned["fedit_smallest_rank"].answers == 3 * 6


def test_nothing_is_left_of_a_run_that_is_over(counted: tuple[dict[str, Counter[str]], LoadedRun, Path]) -> None:
    _, loaded, folder = counted
    assert {(work.trainings, work.answers) for work in remaining_work(loaded, folder).values()} == {(0, 0)}


def test_all_is_left_of_a_run_that_has_yet_to_begin(
    counted: tuple[dict[str, Counter[str]], LoadedRun, Path], tmp_path: Path
) -> None:
    _, loaded, _ = counted
    assert remaining_work(loaded, tmp_path) == planned_work(loaded)
