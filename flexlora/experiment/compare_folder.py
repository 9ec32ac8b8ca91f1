"""Keeps the rows of a comparison in its folder, whole and in agreement with what is compared."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flexlora.experiment.compare_arms import CompareError
from flexlora.experiment.compare_jobs import Job, Study
from flexlora.experiment.compare_study import described
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.files import write_whole
from flexlora.report.study_rows import ROWS_FILE, read_rows

STUDY_FILE = "study.json"


def open_comparison(study: Study, folder: Path, overwrite: bool) -> list[dict[str, Any]]:
    """Return the rows that a folder has for this comparison, after writing what the comparison is."""
    rows_path, study_path = folder / ROWS_FILE, folder / STUDY_FILE
    if folder.exists() and not study_path.exists() and any(folder.iterdir()):
        raise CompareError(f"{folder} holds something else than a comparison; choose another --out")
    wanted = described(study)
    if study_path.exists() and not overwrite:
        try:
            known = json.loads(study_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CompareError(f"{study_path} cannot be read ({error}); start anew with --overwrite") from error
        for name in ("config", "tuning_draws", "trials", "learning_rate", "evaluations", "text", "tune_on"):
            if known.get(name) != wanted[name] and not (name == "config" and _same_config(known, wanted)):
                raise CompareError(
                    f"{folder} holds a comparison with another {name}; choose another --out, or --overwrite to start "
                    "anew (methods, draws and distributions may be added)"
                )
        arms = {arm["label"]: arm for arm in known["arms"]}
        for arm in wanted["arms"]:
            if arms.get(arm["label"], arm) != arm:
                raise CompareError(
                    f"{folder} has rows of another {arm['label']}; give the new one a label of its own, as "
                    f"new={arm['label']}..."
                )
        wanted["arms"] = list({**arms, **{arm["label"]: arm for arm in wanted["arms"]}}.values())
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        rows_path.unlink(missing_ok=True)
    write_whole(study_path, json.dumps(wanted, indent=1))
    _drop_torn_line(rows_path)
    return read_rows(rows_path)


def _same_config(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether both describe the same settings; one that is newer than a folder has its default there."""
    try:
        before, now = (parse_config(yaml.safe_load(one["config"]), STUDY_FILE) for one in (known, wanted))
    except (KeyError, yaml.YAMLError, ConfigError):
        return False
    return before == now


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
            job = Job(row["phase"], row["draw"], row["seed"], row["distribution"], row["arm"], row["learning_rate"])
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
