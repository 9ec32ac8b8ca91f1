"""Keeps the rows of a comparison in its folder, whole and in agreement with what is compared."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexlora.experiment.compare_arms import CompareError
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_place import STUDY_FILE, check_folder, check_same, known_study
from flexlora.experiment.compare_pool import SCRATCH_FOLDER
from flexlora.experiment.compare_study import described
from flexlora.experiment.run_folder import CONFIG_FILE
from flexlora.files import write_whole
from flexlora.locks import locked
from flexlora.report.compare_page import PAGE_FILE
from flexlora.report.study_rows import ROWS_FILE, read_rows


@contextmanager
def locked_comparison(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder of a comparison, which is made if it is missing.

    Raises:
        CompareError: If a comparison runs in it, or it is no folder for one.
    """
    check_folder(folder)

    def refusal(holder: str) -> CompareError:
        return CompareError(
            f"a comparison is running in {folder} ({holder}); wait for it, end it, or choose another --out"
        )

    with locked(folder, refusal):
        yield


def open_comparison(study: Study, folder: Path, overwrite: bool, retry_failed: bool = False) -> list[dict[str, Any]]:
    """Return the rows that a folder has for this comparison, after writing what the comparison is.

    Args:
        study: The comparison.
        folder: Of it alone; see ``locked_comparison``.
        overwrite: Forget what is there.
        retry_failed: Forget the rows of runs that failed.
    """
    rows_path, study_path = folder / ROWS_FILE, folder / STUDY_FILE
    wanted = described(study)
    if overwrite:
        # What the folder is for goes last: until then, it says whose the rest is.
        for path in (rows_path, folder / PAGE_FILE):
            path.unlink(missing_ok=True)
        # A checkpoint of another comparison must not be taken for one of this.
        if (folder / SCRATCH_FOLDER).exists():
            shutil.rmtree(folder / SCRATCH_FOLDER)
    elif study_path.exists():
        known = known_study(study_path)
        check_same(folder, known, wanted)
        arms = {arm["label"]: arm for arm in known["arms"]}
        wanted["arms"] = list({**arms, **{arm["label"]: arm for arm in wanted["arms"]}}.values())
    _drop_torn_line(rows_path)
    rows = read_rows(rows_path)
    write_whole(study_path, json.dumps(wanted, indent=1))
    write_whole(folder / CONFIG_FILE, study.settings)
    if retry_failed and (whole := [row for row in rows if not row.get("failure")]) != rows:
        rows = whole
        write_whole(rows_path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return rows


def known_distributions(folder: Path) -> tuple[str, ...]:
    """Return the distributions of earlier sittings, in their order."""
    path = folder / STUDY_FILE
    return tuple(known_study(path)["distributions"]) if path.exists() else ()


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a kill left incomplete; its run is made again."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def serve_others(study: Study, folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add the copies that rows of earlier sittings lack, for distributions that were added since."""
    labels = {arm.label for arm in study.arms}
    have = {(row["phase"], row["draw"], row["distribution"], row["arm"], row["learning_rate"]) for row in rows}
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["arm"] in labels and not row.get("copy_of") and row["distribution"] in study.distributions:
            job = Job(
                row["phase"], row["draw"], row.get("seed", 0), row["distribution"], row["arm"], row["learning_rate"]
            )
            for copy in copies(study, job, row):
                key = (copy["phase"], copy["draw"], copy["distribution"], copy["arm"], copy["learning_rate"])
                found += [copy] if key not in have else []
    return append_rows(folder, found) if found else []


def copies(study: Study, job: Job, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the other distributions that a run serves."""
    return [{**row, "distribution": other, "copy_of": job.distribution} for other in study.served_by(job)]


def append_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows behind the others, on disk before anything goes on, and return them."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with (folder / ROWS_FILE).open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return list(rows)
