"""Runs a comparison: jobs side by side in processes, a row as soon as each is done, everything resumable."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from flexlora.experiment.compare_folder import (
    append_rows,
    copies,
    known_distributions,
    locked_comparison,
    open_comparison,
    serve_others,
)
from flexlora.experiment.compare_jobs import Job, Study, due_jobs, num_jobs_left
from flexlora.experiment.compare_place import check_jobs
from flexlora.experiment.compare_pool import SCRATCH_FOLDER, JobPool


@dataclass(frozen=True)
class CompareEvent:
    """How far a comparison has come.

    Attributes:
        row: Of the run that has just ended; None at the start.
        num_done: Runs that have ended, those of earlier sittings included.
        num_left: About how many are left.
        seconds_left: About how long they take, judged by the runs that have ended; None while there are none.
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
    retry_failed: bool = False,
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
        retry_failed: Forget the rows of runs that failed first, and make these runs again.
        wanted: Whether a job is for this sitting; the others stay due.
        notify: Told how far it is.

    Raises:
        CompareError: If ``folder`` holds a comparison that runs, or of another configuration, or something
            else, or ``jobs`` are more than this machine could bear.
    """
    check_jobs(jobs)
    with locked_comparison(folder):
        if not overwrite:
            study = _in_known_order(study, known_distributions(folder))
        rows = open_comparison(study, folder, overwrite, retry_failed)
        rows += serve_others(study, folder, rows)
        pool = JobPool(study, folder, jobs)
        try:
            notify(_event(study, rows, jobs))
            while True:
                if until is None or time.time() < until:
                    pool.fill([job for job in due_jobs(study, rows) if wanted(job)])
                if not pool.is_busy:
                    break
                for job, row in pool.finished():
                    rows += append_rows(folder, [row, *copies(study, job, row)])
                    notify(_event(study, rows, jobs, row))
        finally:
            pool.close()
            with suppress(OSError):
                (folder / SCRATCH_FOLDER).rmdir()
    return rows


def _in_known_order(study: Study, known: Sequence[str]) -> Study:
    """Return a study whose first distributions are those of earlier sittings, so that their runs serve the others."""
    order = [name for name in dict.fromkeys((*known, *study.distributions)) if name in study.distributions]
    return replace(study, distributions=tuple(order))


def _event(
    study: Study, rows: Sequence[Mapping[str, Any]], jobs: int, row: Mapping[str, Any] | None = None
) -> CompareEvent:
    """Return how far a comparison is: tuning runs are shorter than those that are scored, so each kind has its mean."""
    runs = [one for one in rows if not one.get("copy_of")]
    left = num_jobs_left(study, rows)
    seconds: dict[str, list[float]] = {"tuning": [], "test": []}
    for one in runs:
        seconds[one["phase"]].append(one.get("seconds") or 0.0)
    known = {phase: mean(values) for phase, values in seconds.items() if values}
    some = next(iter(known.values()), None)
    time_left = None
    if some is not None:
        time_left = sum(number * known.get(phase, some) for phase, number in left.items()) / jobs
    return CompareEvent(row, len(runs), sum(left.values()), time_left)
