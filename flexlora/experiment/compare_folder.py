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
from flexlora.experiment.compare_pool import SCRATCH_FOLDER
from flexlora.experiment.compare_study import described
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.run_folder import CONFIG_FILE, RESUMABLE_CHANGES, differences
from flexlora.files import whole_name, write_whole
from flexlora.foreign import read_json, read_yaml
from flexlora.locks import LOCK_FILE, locked
from flexlora.report.compare_page import PAGE_FILE
from flexlora.report.study_rows import ROWS_FILE, read_rows

STUDY_FILE = "study.json"
SAME = ("tuning_draws", "trials", "learning_rate", "evaluations", "text", "tune_on")
"""What a comparison that goes on must keep, besides its configuration."""


@contextmanager
def locked_comparison(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder of a comparison, which is made if it is missing.

    Raises:
        CompareError: If a comparison runs in it, or it is no folder for one.
    """
    if folder.exists() and not folder.is_dir():
        raise CompareError(f"--out must be a folder; {folder} is a file")
    there = {whole_name(path.name) for path in folder.iterdir()} if folder.is_dir() else set()
    if there - {LOCK_FILE, STUDY_FILE} and STUDY_FILE not in there:
        raise CompareError(f"{folder} holds something else than a comparison; choose another --out")

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
        known = _known(study_path)
        _check_same(folder, known, wanted)
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
    return tuple(_known(path)["distributions"]) if path.exists() else ()


def _known(path: Path) -> dict[str, Any]:
    """Return what a folder says its comparison is."""
    try:
        known = read_json(path.read_bytes(), path.name)
        names = [*(arm["label"] for arm in known["arms"]), *known["distributions"]]
        if not all(isinstance(name, str) for name in names) or not isinstance(
            read_yaml(known["config"], "config"), dict
        ):
            raise TypeError("a name or the configuration is of a wrong type")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CompareError(
            f"{path} is damaged ({type(error).__name__}: {error}); put a copy back, or start anew with --overwrite"
        ) from None
    return known


def _check_same(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise unless a comparison is that of a folder, but for what may be added."""
    changed = list(differences(_settings(known), _settings(wanted)))
    changed = [key for key in changed if key not in RESUMABLE_CHANGES]
    changed += [f"--{name.replace('_', '-')}" for name in SAME if known.get(name) != wanted[name]]
    if changed:
        raise CompareError(
            f"{folder} holds a comparison with another configuration: {', '.join(changed)} differ; choose another "
            "--out, or --overwrite to start anew (methods, draws and distributions may be added)"
        )
    arms = {arm["label"]: arm for arm in known["arms"]}
    for arm in wanted["arms"]:
        if arms.get(arm["label"], arm) != arm:
            raise CompareError(
                f"{folder} has rows of another {arm['label']} ({', '.join(differences(arms[arm['label']], arm))} "
                f"differ); give the new one a label of its own, as new={arm['method'].get('name')}..."
            )


def _settings(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a description; one that is newer than a folder has its default there."""
    tree = read_yaml(described["config"], STUDY_FILE)
    try:
        return parse_config(tree, STUDY_FILE).model_dump(mode="json")
    except ConfigError:
        return tree


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
