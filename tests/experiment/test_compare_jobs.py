"""Which runs a comparison asks for next, by hand-made rows."""

import math
from collections.abc import Callable
from typing import Any

from flexlora.experiment.compare_arms import controls, read_arms
from flexlora.experiment.compare_jobs import FIRST_TEST_SEED, Job, Study, due_jobs, num_jobs_left

TYPES = ("type1", "type4")


def study(methods: str = "flexlora", with_controls: bool = False, **changes: Any) -> Study:
    settings: dict[str, Any] = {
        "config": "demo.yaml",
        "overrides": (),
        "arms": (*(controls() if with_controls else ()), *read_arms(methods)),
        "distributions": ("uniform", "normal"),
        "supports": {"uniform": TYPES, "normal": TYPES},
        "draws": 3,
        "tuning_draws": 2,
        "trials": 5,
        "learning_rate": 0.02,
        "seed": 7,
    }
    return Study(**(settings | changes))


def row_of(job: Job, loss: float | None) -> dict[str, Any]:
    return {
        "phase": job.phase,
        "draw": job.draw,
        "distribution": job.distribution,
        "arm": job.arm,
        "learning_rate": job.learning_rate,
        "validation_loss": loss,
        "diverged": loss is None,
    }


def played(of: Study, loss: Callable[[Job], float | None]) -> list[Job]:
    """Return every job of a comparison whose runs have these losses, in the order they ended."""
    rows: list[dict[str, Any]] = []
    jobs: list[Job] = []
    while due := due_jobs(of, rows):
        jobs.append(due[0])
        rows.append(row_of(due[0], loss(due[0])))
        if copies := of.served_by(due[0]):
            rows += [{**rows[-1], "distribution": other} for other in copies]
    return jobs


def bowl(best: float) -> Callable[[Job], float]:
    return lambda job: abs(math.log2(job.learning_rate / best)) if job.learning_rate else 9.0


def rates(jobs: list[Job], phase: str, distribution: str = "uniform") -> list[float]:
    return sorted({job.learning_rate for job in jobs if job.phase == phase and job.distribution == distribution})


def test_trials_stop_once_the_best_rate_lies_inside() -> None:
    jobs = played(study(), bowl(0.02))
    assert rates(jobs, "tuning") == [0.01, 0.02, 0.04]
    assert rates(jobs, "test") == [0.02]


def test_trials_go_on_beyond_the_better_edge() -> None:
    jobs = played(study(), bowl(0.08))
    assert rates(jobs, "tuning") == [0.01, 0.02, 0.04, 0.08, 0.16]
    assert rates(jobs, "test") == [0.08]


def test_trials_end_at_their_number_even_at_the_edge() -> None:
    jobs = played(study(trials=4), bowl(1.0))
    assert rates(jobs, "tuning") == [0.01, 0.02, 0.04, 0.08]
    assert rates(jobs, "test") == [0.08]


def test_a_rate_that_diverges_once_is_not_chosen() -> None:
    def loss(job: Job) -> float | None:
        return None if job.learning_rate == 0.04 and job.phase == "tuning" and job.draw else 1.0 / job.learning_rate

    assert rates(played(study(), loss), "test") == [0.02]


def test_tuning_and_counting_draws_share_no_seed() -> None:
    jobs = played(study(), bowl(0.02))
    assert {job.seed for job in jobs if job.phase == "tuning"} == {7, 8}
    assert {job.seed for job in jobs if job.phase == "test"} == {7 + FIRST_TEST_SEED + draw for draw in range(3)}


def test_every_arm_sees_the_same_draws() -> None:
    jobs = played(study("flexlora,aligned,zero_pad"), bowl(0.02))
    draws = {
        arm: {(j.draw, j.seed, j.distribution) for j in jobs if j.phase == "test" and j.arm == arm}
        for arm in ("flexlora", "aligned", "zero_pad")
    }
    assert draws["flexlora"] == draws["aligned"] == draws["zero_pad"]
    assert len(draws["flexlora"]) == 6


def test_arms_that_no_rank_assignment_changes_run_once_for_all_distributions() -> None:
    jobs = played(study(with_controls=True), bowl(0.02))
    where = {arm: {job.distribution for job in jobs if job.arm == arm} for arm in {job.arm for job in jobs}}
    for arm in ("base", "fedit_smallest", "fedit_largest", "centralised"):
        assert where[arm] == {"uniform"}, arm
    for arm in ("alone", "large_alone", "flexlora"):
        assert where[arm] == {"uniform", "normal"}, arm


def test_distributions_with_other_types_have_runs_of_their_own() -> None:
    of = study(with_controls=True, supports={"uniform": TYPES, "normal": ("type1",)})
    jobs = played(of, bowl(0.02))
    assert {job.distribution for job in jobs if job.arm == "fedit_smallest"} == {"uniform", "normal"}


def test_one_distribution_can_choose_for_all() -> None:
    jobs = played(study(tune_on="normal"), bowl(0.04))
    assert {job.distribution for job in jobs if job.phase == "tuning"} == {"normal"}
    assert {job.learning_rate for job in jobs if job.phase == "test"} == {0.04}
    assert {job.distribution for job in jobs if job.phase == "test"} == {"uniform", "normal"}


def test_fixed_rates_and_the_base_need_no_tuning() -> None:
    jobs = played(study("flexlora@0.5", with_controls=True), bowl(0.02))
    assert {job.arm for job in jobs if job.phase == "tuning"}.isdisjoint({"base", "flexlora@0.5"})
    assert rates([job for job in jobs if job.arm.startswith("flexlora")], "test") == [0.5]


def test_trials_begin_where_an_arm_says() -> None:
    jobs = played(study("sgd=flexlora:training.optimizer=sgd:start=2"), bowl(2.0))
    assert rates(jobs, "tuning") == [1.0, 2.0, 4.0]


def test_without_tuning_draws_the_rate_is_the_configurations() -> None:
    jobs = played(study(tuning_draws=0), bowl(0.02))
    assert {job.phase for job in jobs} == {"test"}
    assert {job.learning_rate for job in jobs} == {0.02}


def test_what_is_left_counts_the_draws_behind_a_choice_that_is_not_made() -> None:
    of = study(distributions=("uniform",), supports={"uniform": TYPES})
    assert num_jobs_left(of, []) == {"tuning": 3 * 2, "test": 3}
    rows = [row_of(job, 1.0) for job in due_jobs(of, [])]
    assert sum(num_jobs_left(of, rows).values()) < 9
