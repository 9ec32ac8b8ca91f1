"""What a process that dies costs: its own job another try, and the other jobs nothing."""

import errno
import importlib
from pathlib import Path
from typing import Any

import pytest

from flexlora.experiment import compare_pool
from flexlora.experiment.compare_arms import read_arms
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_pool import JobPool

JOBS = """
import errno, os, signal

def begin(study, num_processes):
    pass

def run(job, scratch):
    if job.arm == "killer" or (job.arm == "once" and not scratch.exists()):
        scratch.mkdir(parents=True, exist_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if job.arm == "large":
        raise MemoryError("out of memory")
    if job.arm == "disk":
        raise OSError(errno.ENOSPC, "no space")
    return {"arm": job.arm, "failure": None}
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a maker of pools whose jobs do what their arm is called."""
    (tmp_path / "pool_jobs_of_this_test.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    jobs = importlib.import_module("pool_jobs_of_this_test")
    monkeypatch.setattr(compare_pool, "_begin", jobs.begin)
    monkeypatch.setattr(compare_pool, "_run_in_process", jobs.run)

    def make(arms: list[str], size: int) -> JobPool:
        study = Study(
            config="demo.yaml",
            overrides=(),
            arms=read_arms(",".join(f"{arm}=flexlora" for arm in arms)),
            distributions=("uniform",),
            supports={"uniform": ()},
            draws=1,
            tuning_draws=0,
            trials=1,
            learning_rate=0.1,
            seed=0,
        )
        made = JobPool(study, tmp_path, size)
        made.fill([job_of(arm) for arm in arms])
        return made

    return make


def job_of(arm: str) -> Job:
    return Job("test", 0, 1000, "uniform", arm, 0.1)


def ended(pool: JobPool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while pool.is_busy:
        found |= {job.arm: row for job, row in pool.finished()}
    pool.close()
    return found


def test_a_process_that_dies_again_is_recorded_and_its_neighbours_are_not(pool: Any) -> None:
    rows = ended(pool(["killer", "large", "once", "fine"], 4))
    assert rows["once"]["failure"] is None and rows["fine"]["failure"] is None
    for arm in ("killer", "large"):
        assert "memory ran out" in rows[arm]["failure"] and rows[arm]["diverged"], arm


def test_a_full_disk_ends_the_sitting_and_is_no_result_of_a_method(pool: Any) -> None:
    made = pool(["disk"], 1)
    with pytest.raises(OSError, match="no space") as caught:
        made.finished()
    assert caught.value.errno == errno.ENOSPC
    made.close()


def test_two_labels_that_look_alike_have_folders_of_their_own() -> None:
    names = {compare_pool._name_of(job_of(arm)) for arm in ("a=b", "a-b", "a:b")}
    assert len(names) == 3
