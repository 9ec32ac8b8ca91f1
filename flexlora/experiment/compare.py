"""Runs a comparison: jobs side by side in processes, a row as soon as each is done, everything resumable."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.experiment.client_plans import config_plans
from flexlora.experiment.compare_arms import Arm, CompareError, controls
from flexlora.experiment.compare_jobs import Job, Study, due_jobs, num_jobs_left
from flexlora.experiment.compare_rows import row_of_dead
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config, load_config
from flexlora.federation.client_types import DISTRIBUTIONS
from flexlora.files import write_whole
from flexlora.report.study_rows import ROWS_FILE, read_rows

STUDY_FILE = "study.json"
SCRATCH_FOLDER = "scratch"
CONFIGURED = "configured"
"""Name of the distribution that the configuration itself describes."""

MOST_ATTEMPTS = 2


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


def make_study(
    config_path: Path | str,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    *,
    distributions: Sequence[str] = (),
    draws: int,
    tuning_draws: int = 2,
    trials: int = 5,
    learning_rate: float | None = None,
    evaluations: int = 8,
    text: bool = True,
    tune_on: str | None = None,
    with_controls: bool = True,
) -> Study:
    """Return the comparison of arms, and of the controls, on the draws of a configuration.

    Raises:
        CompareError: If a number is out of range or a distribution has no such name.
        ConfigError: If the configuration is wrong, or does not suit an arm.
    """
    for name, value, least in (("draws", draws, 1), ("tuning_draws", tuning_draws, 0), ("trials", trials, 1)):
        if value < least:
            raise CompareError(f"--{name.replace('_', '-')} must be at least {least}; got {value}")
    config = load_config(config_path, [*overrides, "method={name: flexlora}"], check_paths=True)
    if config.data.validation_examples == 0 and tuning_draws:
        raise CompareError("learning rates are chosen by validation loss; set data.validation_examples above 0")
    names = tuple(dict.fromkeys(distributions)) or (CONFIGURED,)
    if unknown := [name for name in names if name not in (*DISTRIBUTIONS, CONFIGURED)]:
        raise CompareError(
            f"--distributions must be among {', '.join((*DISTRIBUTIONS, CONFIGURED))}; got {', '.join(unknown)}"
        )
    if tune_on is not None and tune_on not in names:
        raise CompareError(f"--tune-on must be one of the distributions, {', '.join(names)}; got {tune_on}")
    for arm in arms:
        load_config(config_path, [*overrides, f"method={json.dumps(dict(arm.method))}", *arm.settings])
    return Study(
        config=str(config_path),
        overrides=tuple(overrides),
        arms=(*(controls() if with_controls else ()), *arms),
        distributions=names,
        supports={name: _support(config, name) for name in names},
        draws=draws,
        tuning_draws=tuning_draws,
        trials=trials,
        learning_rate=learning_rate or config.training.learning_rate,
        seed=config.seed,
        evaluations=evaluations,
        text=text,
        tune_on=tune_on,
    )


def _support(config: Config, distribution: str) -> tuple[str, ...]:
    """Return the client types that a distribution hands out."""
    if config.clients.ranks_from == "devices":
        return (distribution,)
    weights = config.clients.distribution if distribution == CONFIGURED else distribution
    plans = list(config_plans(config))
    if isinstance(weights, str):
        weights = dict(zip(plans, DISTRIBUTIONS[weights], strict=True))
    return tuple(name for name in plans if weights.get(name, 0.0) > 0)


def run_comparison(
    study: Study,
    folder: Path,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    until: float | None = None,
    only: Collection[str] | None = None,
    notify: Callable[[CompareEvent], None] = lambda event: None,
) -> list[dict[str, Any]]:
    """Run what a comparison still lacks and return its rows, those of earlier sittings included.

    Args:
        study: What to compare.
        folder: Where rows are kept; a comparison of the same configuration in it goes on.
        jobs: Processes that run side by side, each with one thread.
        overwrite: Forget the rows in ``folder`` first.
        until: Time (as of ``time.time``) after which no further run is started.
        only: Labels of the arms to run in this sitting; None runs all.
        notify: Told how far it is.

    Raises:
        CompareError: If ``folder`` holds a comparison of another configuration, or files of something else.
    """
    rows = _open_folder(study, folder, overwrite)
    served = _serve_others(study, folder, rows)
    rows += served
    pool = _Pool(study, folder, jobs)
    try:
        notify(CompareEvent(None, _num_runs(rows), num_jobs_left(study, rows), None))
        started, num_new = time.monotonic(), 0
        while True:
            if until is None or time.time() < until:
                pool.fill([job for job in due_jobs(study, rows) if only is None or job.arm in only])
            if not pool.is_busy:
                break
            for job, row in pool.finished():
                rows += _append(folder, [row, *_copies(study, job, row)])
                num_new += 1
                left = num_jobs_left(study, rows)
                seconds = (time.monotonic() - started) / num_new * left
                notify(CompareEvent(row, _num_runs(rows), left, seconds))
    finally:
        pool.close()
    return rows


class _Pool:
    """Processes that run jobs; one that dies costs its job another try, not the comparison."""

    def __init__(self, study: Study, folder: Path, size: int) -> None:
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

    from flexlora.experiment.compare_run import Draws

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


def _open_folder(study: Study, folder: Path, overwrite: bool) -> list[dict[str, Any]]:
    """Return the rows that a folder has for this comparison, after writing what the comparison is."""
    rows_path, study_path = folder / ROWS_FILE, folder / STUDY_FILE
    if folder.exists() and not study_path.exists() and any(folder.iterdir()):
        raise CompareError(f"{folder} holds something else than a comparison; choose another --out")
    described = _described(study)
    if study_path.exists() and not overwrite:
        try:
            known = json.loads(study_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CompareError(f"{study_path} cannot be read ({error}); start anew with --overwrite") from error
        for name in ("config", "tuning_draws", "trials", "learning_rate", "evaluations", "text", "tune_on"):
            if known.get(name) != described[name]:
                raise CompareError(
                    f"{folder} holds a comparison with another {name}; choose another --out, or --overwrite to start "
                    "anew (methods, draws and distributions may be added)"
                )
        arms = {arm["label"]: arm for arm in known["arms"]}
        for arm in described["arms"]:
            if arms.get(arm["label"], arm) != arm:
                raise CompareError(
                    f"{folder} has rows of another {arm['label']}; give the new one a label of its own, as "
                    f"new={arm['label']}..."
                )
        described["arms"] = list({**arms, **{arm["label"]: arm for arm in described["arms"]}}.values())
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        rows_path.unlink(missing_ok=True)
    write_whole(study_path, json.dumps(described, indent=1))
    _drop_torn_line(rows_path)
    return read_rows(rows_path)


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left incomplete; its run is made again."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _described(study: Study) -> dict[str, Any]:
    config = load_config(study.config, [*study.overrides, "method={name: flexlora}"])
    return {
        "config": dump_config(config),
        "path": study.config,
        "overrides": list(study.overrides),
        "arms": [arm.described() for arm in study.arms],
        "distributions": list(study.distributions),
        "draws": study.draws,
        "tuning_draws": study.tuning_draws,
        "trials": study.trials,
        "learning_rate": study.learning_rate,
        "evaluations": study.evaluations,
        "text": study.text,
        "tune_on": study.tune_on,
    }


def _serve_others(study: Study, folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add the copies that rows of earlier sittings lack, for distributions that were added since."""
    labels = {arm.label for arm in study.arms}
    have = {(row["phase"], row["draw"], row["distribution"], row["arm"], row["learning_rate"]) for row in rows}
    copies: list[dict[str, Any]] = []
    for row in rows:
        if row["arm"] in labels and not row.get("copy_of") and row["distribution"] in study.distributions:
            job = Job(row["phase"], row["draw"], row["seed"], row["distribution"], row["arm"], row["learning_rate"])
            for copy in _copies(study, job, row):
                key = (copy["phase"], copy["draw"], copy["distribution"], copy["arm"], copy["learning_rate"])
                copies += [copy] if key not in have else []
    return _append(folder, copies) if copies else []


def _copies(study: Study, job: Job, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**row, "distribution": other, "copy_of": job.distribution} for other in study.served_by(job)]


def _append(folder: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows behind the others, on disk before anything goes on, and return them."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with (folder / ROWS_FILE).open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return list(rows)


def _num_runs(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(not row.get("copy_of") for row in rows)
