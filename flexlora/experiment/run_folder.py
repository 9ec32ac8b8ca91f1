"""Checks, opens and reads the folder of a run."""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexlora.errors import FlexLoraError
from flexlora.experiment.config import Config
from flexlora.experiment.config_data import InMemoryData
from flexlora.experiment.config_file import dump_config, parse_config
from flexlora.files import PARTIAL, file_above, whole_name, write_whole
from flexlora.foreign import ForeignError, read_yaml
from flexlora.locks import LOCK_FILE, locked
from flexlora.report.answer_file import ANSWERS_FILE
from flexlora.report.page import REPORT_FILE
from flexlora.rounds.records import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    REFERENCES_FOLDER,
    ManifestRecord,
    RecordsError,
    read_manifest,
    write_manifest,
)
from flexlora.text import printable

log = logging.getLogger(__name__)

ADAPTERS_FOLDER = "adapters"
SHA256_LETTERS = 64
CONFIG_FILE = "config.yaml"
FEDERATION_FILE = "federation.json"
EXCHANGE_FILE, BROADCASTS_FOLDER, REPLIES_FOLDER, KEYS_FOLDER = "exchange.json", "broadcasts", "replies", "trusted_keys"
"""What only a run has whose clients exchange files with it."""
SERVER_FOLDER = "server"
"""What a running server of real clients keeps beside the run: where it is, who is connected, its log."""

RUN_ENTRIES = {
    ADAPTERS_FOLDER,
    ANSWERS_FILE,
    BROADCASTS_FOLDER,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    FEDERATION_FILE,
    EXCHANGE_FILE,
    KEYS_FOLDER,
    LOCK_FILE,
    REFERENCES_FOLDER,
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    REPLIES_FOLDER,
    REPORT_FILE,
    SERVER_FOLDER,
}
# These are no part of a run, and may be there before and after it.
BESIDE_RUNS = (LOCK_FILE, SERVER_FOLDER)
# A run may need to change these to get past the point where memory or disk ran out; scores move by rounding at most.
RESUMABLE_CHANGES = (
    "data.cache",
    "evaluation.batch_size",
    "model.num_processes",
    "deployment.deadline_seconds",
    "deployment.min_clients",
    "deployment.rejoin_seconds",
    "deployment.wait_seconds",
)


class ExperimentError(FlexLoraError, ValueError):
    """A run that cannot be started, continued or read."""


@contextmanager
def held_folder(config: Config, folder: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Keep other processes that would write out of the folder of a run, once it is sure that the run may go there.

    Raises:
        ExperimentError: If another run is going on there, or naming the rule of `check_folder` and what to do.
    """

    def refusal(holder: str) -> ExperimentError:
        return ExperimentError(
            f"a run is going on in {folder} ({holder}), and a folder has room for one; wait for it, end it, or name "
            "another folder. report, export and eval work beside it"
        )

    if not (folder / LOCK_FILE).exists():
        # Before a lock is put into a folder that may be somebody else's.
        check_folder(config, folder, resume, overwrite)
    with locked(folder, refusal):
        check_folder(config, folder, resume, overwrite)
        yield


def check_folder(config: Config, folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise unless a run with this configuration may be started, resumed or overwritten in ``folder``.

    Raises:
        ExperimentError: Naming the rule and what to do.
    """
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"a run needs a folder to write to; {folder} is a file")
    if file := file_above(folder):
        raise ExperimentError(f"a run needs a folder to write to, but {file} is a file; a folder is needed there")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if resume and not entries:
        # One that was killed before its first write has left something.
        why = "is empty" if folder.is_dir() else "does not exist"
        raise ExperimentError(
            f"there is no run to resume in {folder}, which {why}; name the folder of the run (--out, out=), or leave "
            "--resume out to start one"
        )
    foreign = [path.name for path in entries if whole_name(path.name) not in RUN_ENTRIES]
    holds_run = (folder / CONFIG_FILE).is_file()
    if foreign and not (resume and holds_run):
        raise ExperimentError(
            "a run needs a new folder, or one that holds a run and nothing else; "
            f"{folder} also holds {', '.join(foreign[:5])}"
        )
    if holds_run:
        _check_run(config, folder, resume, overwrite)
    elif rest := [path.name for path in entries if path.suffix != PARTIAL and path.name not in BESIDE_RUNS]:
        held = f"a folder called {CONFIG_FILE}" if CONFIG_FILE in rest else f"{', '.join(rest)} but no {CONFIG_FILE}"
        raise ExperimentError(f"{folder} holds {held}, so it is no whole run; delete it, or name another folder")


def _check_run(config: Config, folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise unless the run in ``folder`` may be resumed or overwritten."""
    if not resume and overwrite:
        return
    if not resume:
        raise ExperimentError(
            f"{folder} already holds a run; resume it (--resume, resume=True), overwrite it (--overwrite, "
            "overwrite=True), or name another folder"
        )
    if (folder / EXCHANGE_FILE).exists():
        raise ExperimentError(
            f"the clients of the run in {folder} exchange files with it; go on with flexlora round aggregate {folder}"
        )
    before = read_run_config(folder)
    if isinstance(before.data, InMemoryData) and not isinstance(config.data, InMemoryData):
        raise ExperimentError(f"the examples of the run in {folder} were passed from Python; pass them again as data=")
    changed = list(differences(before.model_dump(mode="json"), config.model_dump(mode="json")))
    if config.rounds.num_rounds > before.rounds.num_rounds:
        changed.remove("rounds.num_rounds")
    changed = [key for key in changed if key not in RESUMABLE_CHANGES]
    if changed:
        raise ExperimentError(
            f"a resumed run must keep its configuration (rounds.num_rounds may grow, {', '.join(RESUMABLE_CHANGES)} "
            f"may change); {folder} differs in {', '.join(changed)}. Use the settings of its {CONFIG_FILE}, or another "
            "folder"
        )


def open_folder(config: Config, manifest: ManifestRecord, folder: Path, anew: bool) -> None:
    """Make ``folder`` that of this run: configuration, manifest, and nothing of another run.

    Raises:
        ExperimentError: If a resumed run's data have changed.
    """
    if anew and folder.is_dir():
        # The configuration goes last: as long as anything is left, it says whose it is.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            if path.name not in BESIDE_RUNS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for leftover in folder.glob(f"*{PARTIAL}"):
        leftover.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_manifest(folder / MANIFEST_FILE)
    if before is not None:
        manifest = _resumed_manifest(before, manifest, folder)
        if before.num_rounds != manifest.num_rounds:
            # References must be as long as the run they are compared with.
            (folder / REFERENCES_FILE).unlink(missing_ok=True)
    write_whole(folder / CONFIG_FILE, dump_config(config))
    write_manifest(folder / MANIFEST_FILE, manifest)


def _resumed_manifest(before: ManifestRecord, now: ManifestRecord, folder: Path) -> ManifestRecord:
    """Return the manifest of a resumed run: its first environment, and a warning for each change since.

    Raises:
        ExperimentError: If the data have changed, or the run had a training loop of its own and now has none.
    """
    if before.data_hashes != now.data_hashes:
        names = sorted({*before.data_hashes, *now.data_hashes})
        changed = [name for name in names if before.data_hashes.get(name) != now.data_hashes.get(name)]
        raise ExperimentError(
            f"a resumed run needs the data it was started with; in {folder} these have changed: {', '.join(changed)}. "
            "Restore them, or start a run in another folder"
        )
    if (before.trainer is None) != (now.trainer is None):
        what = f"was trained by {before.trainer}; pass it again as" if before.trainer else "was started without"
        raise ExperimentError(f"a resumed run needs the training loop it was started with; {folder} {what} trainer=")
    then = {**before.packages, "device": before.device, "num_threads": before.num_threads, "trainer": before.trainer}
    new = {**now.packages, "device": now.device, "num_threads": now.num_threads, "trainer": now.trainer}
    changes = [f"Resumed with {key} {new[key]} instead of {then.get(key)}." for key in new if new[key] != then.get(key)]
    return before.model_copy(
        update={
            "num_rounds": now.num_rounds,
            "config_hash": now.config_hash,
            "warnings": [*before.warnings, *(change for change in changes if change not in before.warnings)],
        }
    )


def read_run_config(folder: Path) -> Config:
    """Return the configuration of a run.

    Raises:
        ExperimentError: If ``folder`` is not the folder of a run, or its configuration is damaged.
    """
    path = folder / CONFIG_FILE
    if path.is_dir():
        raise ExperimentError(f"{path} must be a file and is a folder; put a copy of the file back")
    if not path.is_file():
        raise ExperimentError(f"the folder of a run holds a {CONFIG_FILE}; {folder} holds none")
    content = path.read_bytes()
    try:
        tree = read_yaml(content, path)
    except ForeignError as error:
        raise ExperimentError(f"{error}; put a copy of the file back") from error
    if not isinstance(tree, dict):
        raise ExperimentError(f"{path} must hold a mapping of sections; put a copy of the file back")
    _tell_of_changes(folder, content)
    return parse_config(tree, str(path))


def _tell_of_changes(folder: Path, content: bytes) -> None:
    """Log a warning if the configuration is not the one that the run wrote: a person or a fault has changed it."""
    try:
        manifest = read_manifest(folder / MANIFEST_FILE)
    except RecordsError:
        return  # Whoever needs the manifest says so.
    known = "" if manifest is None else manifest.config_hash
    if len(known) == SHA256_LETTERS and known != hashlib.sha256(content).hexdigest():
        log.warning(
            "%s is not as the run wrote it; unless you changed a path in it, put a copy of the file back",
            printable(str(folder / CONFIG_FILE)),
        )


def differences(left: Any, right: Any, key: str = "") -> Iterator[str]:
    """Yield the keys in which two trees of settings differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            yield from differences(left.get(name), right.get(name), f"{key}.{name}" if key else name)
    elif left != right:
        yield key
