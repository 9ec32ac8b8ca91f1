"""From a configuration to a finished run folder, and from there to exports and scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.experiment.baselines import measure_references
from flexlora.experiment.config import Config
from flexlora.experiment.export import write_run_adapters
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.round_loop import round_loop
from flexlora.experiment.run_folder import check_folder, open_folder
from flexlora.experiment.stages import Notify, Stage, rounds_stage
from flexlora.report.page import write_report
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import (
    RECORDS_FILE,
    REFERENCES_FILE,
    EvaluationRecord,
    ReferencesRecord,
    RoundRecord,
    read_records,
    read_references,
)


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
    check_folder(config, folder, resume, overwrite)
    notify(Stage("Reading data"))
    participants = gather_participants(config)
    notify(Stage(participants.in_words(), notes=participants.warnings))
    loaded = LoadedRun.load(config, participants, notify)
    # Nothing is written before data and model have been read: a start that fails leaves no folder behind.
    open_folder(loaded, folder, overwrite and not resume)
    loop = round_loop(loaded, config.method, participants.clients, folder, notify)
    notify(rounds_stage(f"Federated rounds ({config.method.name})", loop))
    outcome = run_rounds(loop)
    if outcome.has_progress:
        write_run_adapters(loaded, loop, outcome, folder)
        measure_references(loaded, loop, outcome, folder, notify)
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
