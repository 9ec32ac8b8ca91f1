"""From a configuration to a finished run folder, and from there to exports and scores."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from flexlora import FlexLoraError, __version__
from flexlora.adapters import write_adapter
from flexlora.aggregators import AGGREGATORS, STATE_TYPES
from flexlora.aggregators.base import Aggregator
from flexlora.checkpoint import load_latest
from flexlora.clients import (
    Broadcast,
    count_plans,
)
from flexlora.config import (
    Config,
    dump_config,
    load_config,
    parse_config,
)
from flexlora.model import load_base_model
from flexlora.participants import Participants, base_name, gather_participants
from flexlora.references import FEDIT_FOLDER, measure_references
from flexlora.report.page import REPORT_FILE, write_report
from flexlora.report.records import (
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    EvaluationRecord,
    ManifestRecord,
    ReferencesRecord,
    RoundRecord,
    read_manifest,
    read_records,
    read_references,
    write_manifest,
)
from flexlora.rounds import (
    CHECKPOINTS_FOLDER,
    Loop,
    Outcome,
    run_rounds,
)
from flexlora.whole_model import merge_into_base
from flexlora.workbench import (
    Notify,
    Scorer,
    Stage,
    Workbench,
    adapter_at_rank,
    cohort_size,
    rounds_stage,
    scaling_rule,
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
EVALUATION_KEYS = (
    r"data\.(path|cache|test_examples_per_task|max_length)|evaluation\..*|"
    r"model\.(device|dtype|num_threads|num_processes|attn_.*)|ray(\..*)?"
)
# What a run may need to get past the point where memory or disk ended; scores move by rounding at most.
RESUMABLE_CHANGES = ("data.cache", "evaluation.batch_size", "model.num_processes")
PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "rouge-score")


class ExperimentError(FlexLoraError, ValueError):
    """A run that cannot be started, continued or read."""


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    report: Path
    method: str
    server_round: int
    stopped: str | None
    has_progress: bool
    records: Sequence[RoundRecord]
    references: ReferencesRecord

    def summary(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        last = next((record.evaluation for record in reversed(self.records) if record.evaluation), None)
        fedit = self.references.fedit_smallest_rank
        local = self.references.local_only

        def unseen(evaluation: EvaluationRecord | None) -> dict[str, Any] | None:
            return json.loads(evaluation.unseen.model_dump_json()) if evaluation else None

        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "server_round": self.server_round,
            "stopped": self.stopped,
            "has_progress": self.has_progress,
            "unseen": {
                "base": unseen(self.references.base),
                "federated": unseen(last),
                "fedit_smallest_rank": unseen(fedit.final if fedit else None),
                "local_only": json.loads(local.unseen.model_dump_json()) if local and local.unseen else None,
            },
        }


def run_experiment(
    config: Config, folder: Path, *, resume: bool = False, overwrite: bool = False, notify: Notify = lambda event: None
) -> RunResult:
    """Run everything a configuration describes and leave a complete run folder behind.

    Args:
        config: The run.
        folder: Where to write; must not hold another run.
        resume: Go on with the run in ``folder``; it must have the same configuration, except that
            ``rounds.num_rounds`` may grow and ``evaluation.batch_size`` may change.
        overwrite: Delete the run in ``folder`` first.
        notify: Told about every stage and round.

    Raises:
        ExperimentError: If ``folder`` does not suit, or its data or configuration have changed.
        FlexLoraError: If data or model cannot be read.
    """
    _check_folder(config, folder, resume, overwrite)
    notify(Stage("Reading data"))
    participants = gather_participants(config)
    notify(Stage(participants.in_words(), notes=participants.warnings))
    workbench = Workbench.load(config, participants, notify)
    # Nothing is written before data and model have been read: a start that fails leaves no folder behind.
    _open_folder(workbench, folder, overwrite and not resume)
    loop = workbench.loop(config.method.model_dump(), participants.clients, folder, notify)
    notify(rounds_stage(f"Federated rounds ({config.method.name})", loop))
    outcome = run_rounds(loop)
    if outcome.has_progress:
        write_run_adapters(workbench, loop, outcome, folder)
        measure_references(workbench, loop, outcome, folder, notify)
    return RunResult(
        folder=folder,
        report=write_report(folder),
        method=config.method.name,
        server_round=outcome.server_round,
        stopped=outcome.stopped,
        has_progress=outcome.has_progress,
        records=read_records(folder / RECORDS_FILE),
        references=read_references(folder / REFERENCES_FILE),
    )


def _check_folder(config: Config, folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"--out must be a folder; {folder} is a file")
    foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path)) if folder.is_dir() else []
    holds_run = (folder / CONFIG_FILE).is_file()
    if foreign and not (resume and holds_run):
        raise ExperimentError(
            f"--out must be a new folder or one with nothing but a run; {folder} also holds {', '.join(foreign[:5])}"
        )
    if not holds_run:
        rest = sorted(path.name for path in folder.iterdir() if path.suffix != ".partial") if folder.is_dir() else []
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
    changed = list(_differences(before.model_dump(mode="json"), config.model_dump(mode="json")))
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
    return path.name.removesuffix(".partial") in RUN_ENTRIES


def _open_folder(workbench: Workbench, folder: Path, anew: bool) -> None:
    """Make ``folder`` that of this run: configuration, manifest, and nothing that belongs to another one."""
    if anew and folder.is_dir():
        # The configuration goes last: as long as anything is left, it says whose it is.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    before, manifest = read_manifest(folder / MANIFEST_FILE), _manifest(workbench)
    if before is not None:
        manifest = _continued(before, manifest, folder)
        if before.num_rounds != manifest.num_rounds:
            # What the longer run is compared with has to be as long.
            (folder / REFERENCES_FILE).unlink(missing_ok=True)
    _write_atomically(folder / CONFIG_FILE, dump_config(workbench.config))
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


def _differences(left: Any, right: Any, key: str = "") -> Iterator[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            yield from _differences(left.get(name), right.get(name), f"{key}.{name}" if key else name)
    elif left != right:
        yield key


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_run_config(folder: Path) -> Config:
    """Return the configuration of a run.

    Raises:
        ExperimentError: If ``folder`` is not the folder of a run.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ExperimentError(f"RUN must be the folder of a run, with a {CONFIG_FILE} in it; got {folder}")
    return parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def write_run_adapters(workbench: Workbench, loop: Loop, outcome: Outcome, folder: Path) -> None:
    """Write the global adapter at the server's rank and at the rank of each kind of client."""
    federation = loop.federation
    for leftover in (folder / ADAPTERS_FOLDER).glob(".*"):
        shutil.rmtree(leftover)  # A write that was killed before it could appear.
    wanted = {max(federation.server_ranks.values())}
    wanted |= {max(plan.resolve(workbench.shapes).values()) for plan in workbench.participants.plans.values()}
    top = max(federation.server_ranks.values())
    whole = loop.aggregator.broadcast(outcome.state, federation.server_ranks)
    for rank in sorted(rank for rank in wanted if rank <= top):
        adapter = adapter_at_rank(whole, rank, loop.federation.scaling)
        write_adapter(folder / ADAPTERS_FOLDER / f"rank-{rank}", adapter, workbench.base_name)


def _manifest(workbench: Workbench) -> ManifestRecord:
    config, participants = workbench.config, workbench.participants
    rounds, num_clients = config.rounds, len(participants.clients)
    return ManifestRecord(
        flexlora_version=__version__,
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        python=platform.python_version(),
        platform=platform.platform(),
        seed=config.seed,
        config_hash=hashlib.sha256(dump_config(config).encode()).hexdigest(),
        data_hashes={**participants.corpus.hashes, **_device_hashes(participants)},
        base_model=config.model.name_or_path,
        num_parameters=workbench.model.num_parameters,
        method=config.method.name,
        num_clients=num_clients,
        num_unseen_tasks=len(participants.corpus.unseen),
        num_rounds=rounds.num_rounds,
        cohort_size=cohort_size(config, num_clients),
        plan_counts=count_plans(client.plan for client in participants.clients),
        plan_ranks={name: plan.resolve(workbench.shapes) for name, plan in participants.plans.items()},
        device_counts=dict(sorted(Counter(client.device for client in participants.clients if client.device).items())),
        policy=config.clock.policy if participants.devices else None,
        target_rouge_l=config.evaluation.target_rouge_l,
        device=str(workbench.model.device),
        num_threads=torch.get_num_threads(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=list(participants.warnings),
    )


def _device_hashes(participants: Participants) -> dict[str, str]:
    """Return a SHA-256 of the simulated devices, whose file may change; none without devices."""
    if not participants.devices:
        return {}
    return {"devices": hashlib.sha256(repr(sorted(participants.devices.items())).encode()).hexdigest()}


def export_run(run_folder: Path, folder: Path, *, rank: int | None, merged: bool) -> dict[str, Any]:
    """Write the global adapter of a run as a standard PEFT folder, or merged into the whole model.

    Args:
        run_folder: The folder of a run that has got past round 0.
        folder: Where to write; must not exist.
        rank: In 1 to the server's rank; None takes all of it. Modules whose server rank is smaller keep theirs.
        merged: Write base and adapter as one model, with the tokenizer.

    Returns:
        What was written: ``rank``, ``modules`` and, for a merged model, ``merged``.

    Raises:
        ExperimentError: If the run has no checkpoint, the rank is out of range, or ``folder`` exists.
    """
    config = read_run_config(run_folder)
    if folder.exists():
        raise ExperimentError(f"--out must not exist yet; {folder} does")
    aggregator, state, server_ranks = _final_state(config, run_folder)
    top = max(server_ranks.values())
    if rank is not None and not 1 <= rank <= top:
        raise ExperimentError(f"--rank must be in 1..{top}, the server's rank in this run; got {rank}")
    adapter = adapter_at_rank(aggregator.broadcast(state, server_ranks), rank or top, scaling_rule(config))
    if merged:
        base, tokenizer = load_base_model(
            base_name(config),
            dtype=config.model.dtype,
            device="cpu",
            attn_implementation=config.model.attn_implementation,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
        )
        merge_into_base(base, tokenizer, adapter, folder)
    else:
        write_adapter(folder, adapter, base_name(config))
    written: dict[str, Any] = {"rank": rank or top, "modules": len(adapter)}
    return {**written, "merged": True} if merged else written


def _final_state(config: Config, run_folder: Path) -> tuple[Aggregator[Any], Any, dict[str, int]]:
    """Return the method, its newest state and the server's rank per module, without loading the base model."""
    checkpoint = load_latest(run_folder / CHECKPOINTS_FOLDER, STATE_TYPES)
    if checkpoint is None or checkpoint.server_round == 0:
        raise ExperimentError(f"{run_folder} has no round to take an adapter from yet; let the run finish one")
    options = config.method.model_dump(exclude={"name"})
    aggregator = AGGREGATORS[config.method.name](scaling=scaling_rule(config), **options)
    return aggregator, checkpoint.state, dict(checkpoint.progress["server_ranks"])


def evaluate_run(
    run_folder: Path, overrides: Sequence[str] = (), *, rank: int | None = None
) -> dict[str, EvaluationRecord]:
    """Score the base alone and with the adapter of a run on the run's unseen tasks.

    Args:
        run_folder: The folder of a run that has got past round 0.
        overrides: Settings that replace the run's, for example another ``data.path`` or more examples.
        rank: Cut the adapter to this rank first; None takes all of it.

    Raises:
        ExperimentError: If the run has no checkpoint or the rank is out of range.
    """
    before = read_run_config(run_folder)
    config = load_config(run_folder / CONFIG_FILE, overrides, check_paths=True)
    changed = list(_differences(before.model_dump(mode="json"), config.model_dump(mode="json")))
    # Anything else could turn a client's data into "unseen" tasks, or not fit the adapter.
    refused = [key for key in changed if not re.fullmatch(EVALUATION_KEYS, key)]
    if refused:
        raise ExperimentError(
            "eval can change data.path, data.cache, data.test_examples_per_task, data.max_length, evaluation.* and "
            f"where the model runs; got {', '.join(refused)}"
        )
    aggregator, state, server_ranks = _final_state(config, run_folder)
    top = max(server_ranks.values())
    if rank is not None and not 1 <= rank <= top:
        raise ExperimentError(f"--rank must be in 1..{top}, the server's rank in this run; got {rank}")
    participants = gather_participants(config)
    manifest = read_manifest(run_folder / MANIFEST_FILE)
    if manifest is not None:
        trained = manifest.data_hashes["clients"]
        if participants.corpus.hashes["clients"] != trained:
            raise ExperimentError(
                "data.path must hold the same data as the run was trained on, or its clients' data could count as "
                "unseen; hold other data out with a run of its own"
            )
    workbench = Workbench.load(config, participants)
    scorer = Scorer(workbench)
    adapter = aggregator.broadcast(state, server_ranks)
    if rank is not None:
        adapter = Broadcast(adapter_at_rank(adapter, rank, workbench.scaling))
    return {"base model": scorer.scores(None), f"rank {rank or top}": scorer.scores(adapter)}
