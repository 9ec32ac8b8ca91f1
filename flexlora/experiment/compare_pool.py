"""Runs jobs of a comparison in processes that end with this one; a process that dies costs its job another try."""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_rows import row_of_dead

SCRATCH_FOLDER = "scratch"
MOST_ATTEMPTS = 2


class JobPool:
    """Processes that run jobs; one that dies costs its job another try, not the comparison."""

    def __init__(self, study: Study, folder: Path, size: int) -> None:
        """Start no process yet."""
        self._study, self._folder, self._size = study, folder, size
        self._executor: ProcessPoolExecutor | None = None
        self._running: dict[Future[dict[str, Any]], Job] = {}
        self._attempts: dict[Job, int] = {}

    @property
    def is_busy(self) -> bool:
        """Whether any job runs."""
        return bool(self._running)

    def fill(self, jobs: Sequence[Job]) -> None:
        """Start the first of these jobs that do not run yet, as many as there is room for."""
        running = set(self._running.values())
        for job in [job for job in jobs if job not in running][: self._size - len(running)]:
            if self._executor is None:
                context = multiprocessing.get_context("spawn")
                self._executor = ProcessPoolExecutor(
                    self._size, context, initializer=_start_process, initargs=(self._study,)
                )
            scratch = self._folder / SCRATCH_FOLDER / _name_of(job)
            self._running[self._executor.submit(_run_in_process, job, scratch)] = job

    def finished(self) -> list[tuple[Job, dict[str, Any]]]:
        """Wait until at least one job has ended, and return the rows of those that have."""
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        found = []
        for future in ended:
            job = self._running.pop(future)
            try:
                found.append((job, future.result()))
            except BrokenProcessPool:
                self._running[future] = job
                return found + self._restart()
        return found

    def _restart(self) -> list[tuple[Job, dict[str, Any]]]:
        """Drop the broken pool; return a row for each job that has now died too often."""
        self.close()
        jobs, self._running = list(self._running.values()), {}
        for job in jobs:
            self._attempts[job] = self._attempts.get(job, 0) + 1
        dead = [job for job in jobs if self._attempts[job] >= MOST_ATTEMPTS]
        return [(job, row_of_dead(self._study, job)) for job in dead]

    def close(self) -> None:
        """End the processes; what they were running can be resumed."""
        if self._executor is not None:
            processes = list((self._executor._processes or {}).values())  # pyright: ignore[reportPrivateUsage]
            self._executor.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            self._executor = None


_draws: Any = None
_study: Study | None = None


def _start_process(study: Study) -> None:
    """Prepare a process of the pool: one thread, and a place for the draw it works on."""
    global _draws, _study
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    from flexlora.experiment.compare_draws import Draws

    torch.set_num_threads(1)
    _draws, _study = Draws(study), study


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_process(job: Job, scratch: Path) -> dict[str, Any]:
    from flexlora.experiment.compare_run import run_job

    assert _study is not None
    return run_job(_study, job, _draws, scratch)


def _name_of(job: Job) -> str:
    label = "".join(letter if letter.isalnum() else "-" for letter in job.arm)
    return f"{job.phase}-{job.draw}-{job.distribution}-{label}-{job.learning_rate:g}"
