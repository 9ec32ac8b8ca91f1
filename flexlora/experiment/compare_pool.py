"""Runs jobs of a comparison in processes that end with this one; a process that dies costs its job another try."""

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_rows import row_of_dead
from flexlora.foreign import read_yaml
from flexlora.foreign_logs import quiet_libraries
from flexlora.orphans import call_watched, packed_call

SCRATCH_FOLDER = "scratch"
MOST_ATTEMPTS = 2
# Of the memory of a GPU, for all processes together; the rest is for what each needs besides tensors.
_GPU_SHARE = 0.85


@dataclass(frozen=True)
class _Running:
    job: Job
    place: int
    attempt: int


class JobPool:
    """Places side by side, each a process that runs one job after the other.

    A process that dies, or that runs out of memory, costs its own job another try; the other processes go on.
    """

    def __init__(self, study: Study, folder: Path, size: int) -> None:
        """Start no process yet."""
        self._study, self._folder, self._size = study, folder, size
        self._places: dict[int, ProcessPoolExecutor] = {}
        self._running: dict[Future[dict[str, Any]], _Running] = {}

    @property
    def is_busy(self) -> bool:
        """Whether any job runs."""
        return bool(self._running)

    def fill(self, jobs: Sequence[Job]) -> None:
        """Start the first of these jobs that do not run yet, as many as there is room for."""
        running = {one.job for one in self._running.values()}
        free = sorted(set(range(self._size)) - {one.place for one in self._running.values()})
        for place, job in zip(free, (job for job in jobs if job not in running), strict=False):
            self._start(_Running(job, place, 1))

    def finished(self) -> list[tuple[Job, dict[str, Any]]]:
        """Wait until a job has ended or has to be tried again, and return the rows of those that have ended.

        Raises:
            OSError: The disk is full or failed.
        """
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        found = []
        for future in ended:
            one = self._running.pop(future)
            try:
                found.append((one.job, future.result()))
            except (BrokenProcessPool, MemoryError):
                _end(self._places.pop(one.place), at_work=True)
                if one.attempt < MOST_ATTEMPTS:
                    self._start(replace(one, attempt=one.attempt + 1))
                else:
                    found.append((one.job, row_of_dead(self._study, one.job)))
        return found

    def close(self) -> None:
        """End the processes; what they were running can be resumed."""
        at_work = {one.place for one in self._running.values()}
        for place, executor in self._places.items():
            _end(executor, at_work=place in at_work)
        self._places, self._running = {}, {}

    def _start(self, one: _Running) -> None:
        if one.place not in self._places:
            context = multiprocessing.get_context("spawn")
            call = os.getpid(), packed_call(_begin, self._study, self._size)
            self._places[one.place] = ProcessPoolExecutor(1, context, initializer=call_watched, initargs=call)
        scratch = self._folder / SCRATCH_FOLDER / _name_of(one.job)
        with _without_interrupts():
            self._running[self._places[one.place].submit(_run_in_process, one.job, scratch)] = one


def _end(executor: ProcessPoolExecutor, *, at_work: bool) -> None:
    """End the process of a place, at once if it is at work."""
    if at_work:
        for process in list((executor._processes or {}).values()):  # pyright: ignore[reportPrivateUsage]
            process.terminate()
    executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that an interruption of the terminal does not reach: this process ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_draws: Any = None
_study: Study | None = None


def _begin(study: Study, num_processes: int) -> None:
    """Prepare a process of the pool: one thread, its share of a GPU, and a place for the draw it works on."""
    global _draws, _study
    quiet_libraries()
    import torch
    from transformers.utils import logging as transformers_logging

    from flexlora.experiment.compare_draws import Draws

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    on_cpu = read_yaml(study.settings, study.config)["model"]["device"] == "cpu"
    if not on_cpu and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(_GPU_SHARE / num_processes)
    _draws, _study = Draws(study), study


def _run_in_process(job: Job, scratch: Path) -> dict[str, Any]:
    from flexlora.experiment.compare_run import run_job

    assert _study is not None
    return run_job(_study, job, _draws, scratch)


def _name_of(job: Job) -> str:
    """Return a name for the folder of a job, which no other job has."""
    label = "".join(letter if letter.isalnum() else "-" for letter in job.arm)[:40]
    return f"{job.phase}-{job.draw}-{job.distribution}-{label}-{sha256(repr(job.key).encode()).hexdigest()[:8]}"
