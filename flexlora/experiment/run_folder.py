"""The folder of a run: opened, continued, described."""

import hashlib
import importlib.metadata
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from flexlora.errors import FlexLoraError
from flexlora.experiment.baselines import FEDIT_FOLDER
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config, parse_config
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.participants import Participants
from flexlora.experiment.round_loop import cohort_size
from flexlora.federation.clients import count_plans
from flexlora.files import PARTIAL, write_whole
from flexlora.report.page import REPORT_FILE
from flexlora.rounds.loop_parts import CHECKPOINTS_FOLDER
from flexlora.rounds.records import (
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    ManifestRecord,
    read_manifest,
    write_manifest,
)

ADAPTERS_FOLDER = "adapters"


CONFIG_FILE = "config.yaml"


RUN_ENTRIES = {
    ADAPTERS_FOLDER,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    FEDIT_FOLDER.parts[0],
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    REPORT_FILE,
}


# What a run may need to get past the point where memory or disk ended; scores move by rounding at most.
RESUMABLE_CHANGES = ("data.cache", "evaluation.batch_size", "model.num_processes")


PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "rouge-score")


class ExperimentError(FlexLoraError, ValueError):
    """A run that cannot be started, continued or read."""


def check_folder(config: Config, folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise unless a run with this configuration may be started, continued or overwritten in ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"--out must be a folder; {folder} is a file")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path)) if folder.is_dir() else []
    holds_run = (folder / CONFIG_FILE).is_file()
    if foreign and not (resume and holds_run):
        raise ExperimentError(
            f"--out must be a new folder or one with nothing but a run; {folder} also holds {', '.join(foreign[:5])}"
        )
    if not holds_run:
        rest = sorted(path.name for path in folder.iterdir() if path.suffix != PARTIAL) if folder.is_dir() else []
        if rest:
            raise ExperimentError(
                f"{folder} holds {', '.join(rest)} but no {CONFIG_FILE}, so it is no whole run; delete it or name "
                "another --out"
            )
        return
    if overwrite and not resume:
        return
    if not resume:
        raise ExperimentError(
            f"{folder} already holds a run; add --resume to go on with it, --overwrite to start anew, "
            "or name another --out"
        )
    before = read_run_config(folder)
    changed = list(differences(before.model_dump(mode="json"), config.model_dump(mode="json")))
    if config.rounds.num_rounds > before.rounds.num_rounds:
        changed.remove("rounds.num_rounds")
    changed = [key for key in changed if key not in RESUMABLE_CHANGES]
    if changed:
        raise ExperimentError(
            f"a resumed run must keep its configuration (rounds.num_rounds may grow, {', '.join(RESUMABLE_CHANGES)} "
            f"may change); {folder} differs in {', '.join(changed)}. Use the settings of its config.yaml, or another "
            "--out"
        )


def _is_ours(path: Path) -> bool:
    """Return whether a run writes an entry of this name."""
    return path.name.removesuffix(PARTIAL) in RUN_ENTRIES


def open_folder(loaded: LoadedRun, folder: Path, anew: bool) -> None:
    """Make ``folder`` that of this run: configuration, manifest, and nothing that belongs to another one."""
    if anew and folder.is_dir():
        # The configuration goes last: as long as anything is left, it says whose it is.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    before, manifest = read_manifest(folder / MANIFEST_FILE), _manifest(loaded)
    if before is not None:
        manifest = _continued(before, manifest, folder)
        if before.num_rounds != manifest.num_rounds:
            # What the longer run is compared with has to be as long.
            (folder / REFERENCES_FILE).unlink(missing_ok=True)
    write_whole(folder / CONFIG_FILE, dump_config(loaded.config))
    write_manifest(folder / MANIFEST_FILE, manifest)


def _continued(before: ManifestRecord, now: ManifestRecord, folder: Path) -> ManifestRecord:
    """Return the manifest of a resumed run: its first environment, and a warning for whatever has changed.

    Raises:
        ExperimentError: If the data have changed.
    """
    if before.data_hashes != now.data_hashes:
        names = sorted({*before.data_hashes, *now.data_hashes})
        changed = [name for name in names if before.data_hashes.get(name) != now.data_hashes.get(name)]
        raise ExperimentError(
            f"the data have changed since {folder} was started ({', '.join(changed)}); restore them or start anew with "
            "another --out"
        )
    then = {**before.packages, "device": before.device, "num_threads": before.num_threads}
    new = {**now.packages, "device": now.device, "num_threads": now.num_threads}
    changes = [f"Resumed with {key} {new[key]} instead of {then.get(key)}." for key in new if new[key] != then.get(key)]
    return before.model_copy(
        update={
            "num_rounds": now.num_rounds,
            "config_hash": now.config_hash,
            "warnings": [*before.warnings, *(change for change in changes if change not in before.warnings)],
        }
    )


def differences(left: Any, right: Any, key: str = "") -> Iterator[str]:
    """Yield the keys in which two trees of settings differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            yield from differences(left.get(name), right.get(name), f"{key}.{name}" if key else name)
    elif left != right:
        yield key


def read_run_config(folder: Path) -> Config:
    """Return the configuration of a run.

    Raises:
        ExperimentError: If ``folder`` is not the folder of a run.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ExperimentError(f"RUN must be the folder of a run, with a {CONFIG_FILE} in it; got {folder}")
    return parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def _manifest(loaded: LoadedRun) -> ManifestRecord:
    config, participants = loaded.config, loaded.participants
    rounds, num_clients = config.rounds, len(participants.clients)
    return ManifestRecord(
        flexlora_version=importlib.metadata.version("flexlora"),
        packages={name: importlib.metadata.version(name) for name in PACKAGES} | _own_method(config),
        python=platform.python_version(),
        platform=platform.platform(),
        seed=config.seed,
        config_hash=hashlib.sha256(dump_config(config).encode()).hexdigest(),
        data_hashes={**participants.corpus.hashes, **_device_hashes(participants)},
        base_model=config.model.name_or_path,
        num_parameters=loaded.model.num_parameters,
        method=config.method.name,
        num_clients=num_clients,
        num_unseen_tasks=len(participants.corpus.unseen),
        num_rounds=rounds.num_rounds,
        cohort_size=cohort_size(config, num_clients),
        plan_counts=count_plans(client.plan for client in participants.clients),
        plan_ranks={name: plan.resolve(loaded.shapes) for name, plan in participants.plans.items()},
        device_counts=dict(sorted(Counter(client.device for client in participants.clients if client.device).items())),
        policy=config.clock.policy if participants.devices else None,
        target_rouge_l=config.evaluation.target_rouge_l,
        device=str(loaded.model.device),
        num_threads=torch.get_num_threads(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=list(participants.warnings),
    )


def _own_method(config: Config) -> dict[str, str]:
    """Return name and SHA-256 of the file with the user's own method; none for a method of a package."""
    if config.method.path is None:
        return {}
    path = Path(config.method.path).expanduser()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


def _device_hashes(participants: Participants) -> dict[str, str]:
    """Return a SHA-256 of the simulated devices, whose file may change; none without devices."""
    if not participants.devices:
        return {}
    return {"devices": hashlib.sha256(repr(sorted(participants.devices.items())).encode()).hexdigest()}
