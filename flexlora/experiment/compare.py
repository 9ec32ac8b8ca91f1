"""Runs a comparison: jobs side by side in processes, a row as soon as each is done, everything resumable."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.experiment.compare_folder import append_rows, copies, open_comparison, serve_others
from flexlora.experiment.compare_jobs import Job, Study, due_jobs, num_jobs_left
from flexlora.experiment.compare_pool import JobPool


@dataclass(frozen=True)
class CompareEvent:
    """How far a comparison has come.

    Attributes:
        row: Of the run that has just ended; None at the start.
        num_done: Runs that have ended, those of earlier sittings included.
        num_left: About how many are left.
        seconds_left: About how long they take; None while no run of this sitting has ended.
    """

    row: Mapping[str, Any] | None
    num_done: int
    num_left: int
    seconds_left: float | None


def run_comparison(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    until: float | None = None,
    wanted: Callable[[Job], bool] = lambda job: True,
    notify: Callable[[CompareEvent], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Run what a comparison still lacks and return its rows, those of earlier sittings included.

    Args:
        study: What to compare.
        folder: Where rows are kept; a comparison of the same configuration in it goes on.
        jobs: Processes that run side by side, each with one thread.
        overwrite: Forget the rows in ``folder`` first.
        until: Time (as of ``time.time``) after which no further run is started.
        wanted: Whether a job is for this sitting; the others stay due.
        notify: Told how far it is.

    Raises:
        CompareError: If ``folder`` holds a comparison of another configuration, or files of something else.
    """
    rows = open_comparison(study, folder, overwrite)
    rows += serve_others(study, folder, rows)
    pool = JobPool(study, folder, jobs)
    try:
        notify(CompareEvent(None, _num_runs(rows), num_jobs_left(study, rows), None))
        started, num_new = time.monotonic(), 0
        while True:
            if until is None or time.time() < until:
                pool.fill([job for job in due_jobs(study, rows) if wanted(job)])
            if not pool.is_busy:
                break
            for job, row in pool.finished():
                rows += append_rows(folder, [row, *copies(study, job, row)])
                num_new += 1
                left = num_jobs_left(study, rows)
                seconds = (time.monotonic() - started) / num_new * left
                notify(CompareEvent(row, _num_runs(rows), left, seconds))
    finally:
        pool.close()
    return rows


def _num_runs(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(not row.get("copy_of") for row in rows)
