"""From a configuration to a finished run folder, and from there to exports and scores."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from flexlora import FlexLoraError, __version__
from flexlora.adapters import merge_into_base, write_adapter
from flexlora.aggregators import AGGREGATORS, STATE_TYPES
from flexlora.aggregators.base import Aggregator
from flexlora.checkpoint import load_latest
from flexlora.clients import (
    Broadcast,
    compact_ranks,
    count_plans,
)
from flexlora.config import (
    Config,
    dump_config,
    load_config,
    parse_config,
)
from flexlora.data.examples import FederatedCorpus
from flexlora.model import load_base_model
from flexlora.participants import gather_participants
from flexlora.references import measure_references
from flexlora.report.page import write_report
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
from flexlora.workbench import (
    Notify,
    Scorer,
    Stage,
    Workbench,
    adapter_at_rank,
    base_name,
    cohort_size,
    rounds_stage,
    scaling_rule,
)

ADAPTERS_FOLDER = "adapters"
CONFIG_FILE = "config.yaml"
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
            return evaluation.unseen.model_dump(mode="json") if evaluation else None

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
                "local_only": local.unseen.model_dump(mode="json") if local and local.unseen else None,
            },
        }


def run_experiment(
    config: Config, folder: Path, *, resume: bool = False, overwrite: bool = False, notify: Notify = lambda event: None
) -> RunResult:
    """Run everything a configuration describes and leave a complete run folder behind.

    Args:
        config: The run.
        folder: Where to write; must not hold another run.
        resume: Go on with the run in ``folder``; it must have the same configuration (``rounds.num_rounds`` may grow).
        overwrite: Delete the run in ``folder`` first.
        notify: Told about every stage and round.

    Raises:
        ExperimentError: If ``folder`` does not suit, or its data or configuration have changed.
        FlexLoraError: If data or model cannot be read.
    """
    _prepare_folder(config, folder, resume, overwrite)
    notify(Stage("Reading data"))
    participants = gather_participants(config)
    workbench = Workbench.load(config, participants, notify)
    _check_manifest(folder, workbench)
    loop = workbench.loop(config.method.model_dump(), participants.clients, folder, notify)
    notify(rounds_stage(f"Federated rounds ({config.method.name})", loop))
    outcome = run_rounds(loop)
    write_run_adapters(workbench, loop, outcome, folder)
    measure_references(workbench, loop, outcome.state, folder, notify)
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


def _prepare_folder(config: Config, folder: Path, resume: bool, overwrite: bool) -> None:
    holds_run = (folder / CONFIG_FILE).is_file()
    if folder.exists() and not folder.is_dir():
        raise ExperimentError(f"--out must be a folder; {folder} is a file")
    if overwrite and not resume and holds_run:
        shutil.rmtree(folder)
        holds_run = False
    if not holds_run and folder.is_dir() and any(folder.iterdir()):
        raise ExperimentError(f"--out must be a new folder or one with a run; {folder} holds other files")
    if holds_run and not resume:
        raise ExperimentError(
            f"{folder} already holds a run; add --resume to go on with it, --overwrite to start anew, "
            "or name another --out"
        )
    if holds_run:
        before = read_run_config(folder).model_dump(mode="json")
        changed = [key for key in _differences(before, config.model_dump(mode="json")) if key != "rounds.num_rounds"]
        if changed:
            raise ExperimentError(
                f"a resumed run must keep its configuration; {folder} differs in {', '.join(changed)}. "
                "Use the settings of its config.yaml, or another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(folder / CONFIG_FILE, dump_config(config))


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
    wanted = {max(federation.server_ranks.values())}
    wanted |= {max(plan.resolve(workbench.shapes).values()) for plan in workbench.participants.plans.values()}
    top = max(federation.server_ranks.values())
    whole = loop.aggregator.broadcast(outcome.state, federation.server_ranks)
    for rank in sorted(rank for rank in wanted if rank <= top):
        adapter = adapter_at_rank(whole, rank, loop.federation.scaling)
        target = folder / ADAPTERS_FOLDER / f"rank-{rank}"
        if target.exists():
            shutil.rmtree(target)
        write_adapter(target, adapter, workbench.base_name)


def _check_manifest(folder: Path, workbench: Workbench) -> None:
    """Write the manifest, or compare with the one there: a resumed run must meet the same data."""
    path, manifest = folder / MANIFEST_FILE, _manifest(workbench)
    before = read_manifest(path)
    if before is not None and before.data_hashes != manifest.data_hashes:
        raise ExperimentError(
            f"the data have changed since {folder} was started; restore them or start anew with another --out"
        )
    started = before.started if before else datetime.now(UTC).isoformat(timespec="seconds")
    write_manifest(path, manifest.model_copy(update={"started": started}))


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
        data_hashes=corpus_hashes(participants.corpus),
        base_model=config.model.name_or_path,
        num_parameters=workbench.model.num_parameters,
        method=config.method.name,
        num_clients=num_clients,
        num_unseen_tasks=len(participants.corpus.unseen),
        num_rounds=rounds.num_rounds,
        cohort_size=cohort_size(config, num_clients),
        plan_counts=count_plans(client.plan for client in participants.clients),
        plan_ranks={name: compact_ranks(plan.resolve(workbench.shapes)) for name, plan in participants.plans.items()},
        warnings=list(participants.warnings),
    )


def corpus_hashes(corpus: FederatedCorpus) -> dict[str, str]:
    """Return a SHA-256 of the clients' examples and one of the unseen tasks'."""
    hashes = {}
    for name, owners in (("clients", corpus.clients), ("unseen", corpus.unseen)):
        digest = hashlib.sha256()
        for owner, splits in sorted(owners.items()):
            digest.update(repr((owner, splits)).encode())
        hashes[name] = digest.hexdigest()
    return hashes


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
    read_run_config(run_folder)
    config = load_config(run_folder / CONFIG_FILE, overrides, check_paths=True)
    aggregator, state, server_ranks = _final_state(config, run_folder)
    top = max(server_ranks.values())
    if rank is not None and not 1 <= rank <= top:
        raise ExperimentError(f"--rank must be in 1..{top}, the server's rank in this run; got {rank}")
    workbench = Workbench.load(config, gather_participants(config))
    scorer = Scorer(workbench)
    adapter = aggregator.broadcast(state, server_ranks)
    if rank is not None:
        adapter = Broadcast(adapter_at_rank(adapter, rank, workbench.scaling))
    return {"base model": scorer.scores(None), f"rank {rank or top}": scorer.scores(adapter)}
