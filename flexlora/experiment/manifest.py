"""Describes a run for its manifest: versions, seeds, hashes of the data, clients and ranks."""

import hashlib
import importlib.metadata
import platform
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch

from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config
from flexlora.experiment.gathered import GatheredRun
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.machine import machine_in_words
from flexlora.experiment.participants import Participants
from flexlora.experiment.round_loop import cohort_size
from flexlora.federation.clients import count_plans
from flexlora.rounds.records import ManifestRecord
from flexlora.training.one_client import TrainClient

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "rouge-score")


def manifest_of(loaded: LoadedRun) -> ManifestRecord:
    """Return the manifest of a run that starts now, in this environment."""
    return gathered_manifest(loaded, loaded.model.num_parameters, loaded.model.device, loaded.train_one)


def gathered_manifest(
    run: GatheredRun, num_parameters: int, device: torch.device, train_one: TrainClient | None = None
) -> ManifestRecord:
    """Return the manifest of a run whose base model may not be loaded here.

    Args:
        run: The run.
        num_parameters: Of its base.
        device: What this process computes on.
        train_one: A training loop of the user's own.
    """
    config, participants = run.config, run.participants
    rounds, num_clients = config.rounds, len(participants.clients)
    return ManifestRecord(
        flexlora_version=version_of("flexlora"),
        packages={name: version_of(name) for name in PACKAGES} | _own_method(config),
        python=platform.python_version(),
        platform=platform.platform(),
        seed=config.seed,
        config_hash=hashlib.sha256(dump_config(config).encode()).hexdigest(),
        data_hashes={**participants.corpus.hashes, **_device_hashes(participants)},
        base_model=config.model.name_or_path,
        num_parameters=num_parameters,
        method=config.method.name,
        num_clients=num_clients,
        num_unseen_tasks=len(participants.corpus.unseen),
        num_rounds=rounds.num_rounds,
        cohort_size=cohort_size(config, num_clients),
        plan_counts=count_plans(client.plan for client in participants.clients),
        plan_ranks={name: plan.resolve(run.shapes) for name, plan in participants.plans.items()},
        device_counts=dict(sorted(Counter(client.device for client in participants.clients if client.device).items())),
        policy=config.clock.policy if participants.devices else None,
        target_rouge_l=config.evaluation.target_rouge_l,
        device=str(device),
        num_threads=torch.get_num_threads(),
        machine=machine_in_words(torch.device(device)),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        trainer=None if train_one is None else _name_of(train_one),
        warnings=list(participants.warnings),
    )


def _name_of(train_one: TrainClient) -> str:
    """Return the name of a training loop: of the function itself where it is wrapped."""
    function = getattr(train_one, "function", train_one)
    return getattr(function, "__qualname__", type(function).__qualname__)


def version_of(package: str) -> str:
    """Return the version of a package; a source tree on the path has none, and runs all the same."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


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
