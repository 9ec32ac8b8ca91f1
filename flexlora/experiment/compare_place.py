"""Decides whether a comparison may go into a folder: an empty one, or one that holds the same comparison."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexlora.experiment.compare_arms import CompareError
from flexlora.experiment.compare_jobs import Study
from flexlora.experiment.compare_study import described
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.run_folder import RESUMABLE_CHANGES, differences
from flexlora.files import file_above, whole_name
from flexlora.foreign import read_json, read_yaml
from flexlora.limits import most_processes, num_cores
from flexlora.locks import LOCK_FILE
from flexlora.text import count_text

STUDY_FILE = "study.json"
SAME = ("tuning_draws", "trials", "learning_rate", "evaluations", "text", "tune_on")
"""What a comparison that goes on must keep, besides its configuration."""


def check_place(study: Study, folder: Path, overwrite: bool, jobs: int) -> None:
    """Raise unless a comparison may go into a folder, with so many jobs side by side; nothing is written.

    Raises:
        CompareError: Naming the option.
    """
    check_jobs(jobs)
    check_folder(folder)
    path = folder / STUDY_FILE
    if path.exists() and not overwrite:
        check_same(folder, known_study(path), described(study))


def check_jobs(jobs: int) -> None:
    """Raise unless this machine can bear so many jobs side by side."""
    most = most_processes()
    if not 1 <= jobs <= most:
        here = f"on the {count_text(num_cores(), 'core')} of this machine"
        raise CompareError(f"--jobs must be in 1..{most} {here}; got {jobs}")


def check_folder(folder: Path) -> None:
    """Raise unless a folder holds a comparison or nothing; it need not exist."""
    if file := file_above(folder):
        raise CompareError(f"--out: {file} is a file; a folder is needed there")
    if folder.exists() and not folder.is_dir():
        raise CompareError(f"--out must be a folder; {folder} is a file")
    there = {whole_name(path.name) for path in folder.iterdir()} if folder.is_dir() else set()
    if there - {LOCK_FILE, STUDY_FILE} and STUDY_FILE not in there:
        raise CompareError(f"{folder} holds something else than a comparison; choose another --out")


def known_study(path: Path) -> dict[str, Any]:
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


def check_same(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
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
