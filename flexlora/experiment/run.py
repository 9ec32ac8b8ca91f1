"""Runs what a configuration describes, from the data to a finished run folder."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from flexlora.aggregators.base import state_types
from flexlora.data.owned_examples import OwnedRow
from flexlora.experiment.base import resolve_device
from flexlora.experiment.baselines import measure_references
from flexlora.experiment.config import Config
from flexlora.experiment.export import write_run_adapters
from flexlora.experiment.kept_answers import answer_keeper, tell_of_lost_answers
from flexlora.experiment.loaded import LoadedRun, scaling_rule
from flexlora.experiment.manifest import manifest_of
from flexlora.experiment.method_failures import naming_failures
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.reference_runs import wanted_runs
from flexlora.experiment.result import RunResult
from flexlora.experiment.round_loop import aggregator_of, round_loop, rounds_stage
from flexlora.experiment.run_folder import ExperimentError, held_folder, open_folder
from flexlora.experiment.scoring import Scorer
from flexlora.experiment.stages import Notify, Stage, ignore
from flexlora.experiment.work_left import remaining_work, total
from flexlora.report.answer_file import BASE, FEDERATED
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.records import (
    RECORDS_FILE,
    REFERENCES_FILE,
    ReferencesRecord,
    RoundRecord,
    read_records,
    read_references,
)
from flexlora.training.one_client import TrainClient
from flexlora.training.own_loop import TrainFunction, as_train_client


def run_experiment(
    config: Config,
    folder: Path | str,
    *,
    data: Iterable[OwnedRow] | None = None,
    trainer: TrainFunction | None = None,
    resume: bool = False,
    overwrite: bool = False,
    notify: Notify = ignore,
) -> RunResult:
    """Run everything a configuration describes and leave a complete run folder behind.

    Args:
        config: The run.
        folder: Where to write; must not hold another run.
        data: The examples of ``data.name: in_memory``, each with its owner; None for all other data.
        trainer: Trains each client instead of the package's own loop, references included.
        resume: Go on with the run in ``folder``; it must have the same configuration, except that
            ``rounds.num_rounds`` may grow and ``evaluation.batch_size`` may change.
        overwrite: Delete the run in ``folder`` first.
        notify: Told about every stage and round.

    Raises:
        ExperimentError: If ``folder`` does not suit, another run is going on in it, or its data or configuration have
            changed.
        FlexLoraError: If data or model cannot be read.
    """
    folder = Path(folder)
    # What a method or a training loop of the user's own lacks is told before anything is read or loaded.
    state_types(aggregator_of(config.method, scaling_rule(config)))
    train_one = None if trainer is None else as_train_client(trainer)
    if trainer is not None and not config.method.traits().takes_own_training:
        raise ExperimentError(
            f"a trainer of your own moves factors alone, but clients of method.name={config.method.name} train cores "
            "or chosen entries, or under a penalty; leave trainer out or choose another method or other options"
        )
    secure_sum = config.privacy.secure_sum
    if trainer is not None and secure_sum is not None and secure_sum.largest_change is None:
        raise ExperimentError(
            "a secure sum needs a bound of what training changes, and that of a trainer of your own is not known; set "
            "privacy.secure_sum.largest_change"
        )
    with held_folder(config, folder, resume, overwrite):
        return _run_in(config, folder, data, train_one, overwrite and not resume, notify)


def _run_in(
    config: Config,
    folder: Path,
    data: Iterable[OwnedRow] | None,
    train_one: TrainClient | None,
    anew: bool,
    notify: Notify,
) -> RunResult:
    """Run what a configuration describes in a folder that is this process's own."""
    # A device that is not there is told before hours of reading.
    resolve_device(config.model.device)
    notify(Stage("Reading data"))
    participants = gather_participants(config, data)
    notify(Stage(participants.in_words(), notes=participants.warnings))
    loaded = LoadedRun.load(config, participants, notify, train_one)
    # Nothing is written before data and model have been read: a start that fails leaves no folder behind.
    open_folder(config, manifest_of(loaded), folder, anew)
    loop = round_loop(loaded, config.method, participants.clients, folder, notify)
    scorer = Scorer(loaded, answer_keeper(loaded, folder, FEDERATED))
    loop = dataclasses.replace(loop, evaluator=scorer)
    notify(rounds_stage(f"Federated rounds ({config.method.name})", loop, total(remaining_work(loaded, folder))))
    with naming_failures(loop.aggregator, config.method.name):
        outcome = run_rounds(loop)
        if outcome.has_progress:
            write_run_adapters(loaded, loop, outcome, folder)
    if outcome.has_progress:
        measure_references(loaded, loop, outcome, folder, notify)
    rounds, references = read_records(folder / RECORDS_FILE), read_references(folder / REFERENCES_FILE)
    tell_of_lost_answers(loaded, folder, _answering(loaded, rounds, references))
    notify(Stage("Writing the report"))
    return RunResult.of(folder, config.method.name, outcome, rounds, references)


def _answering(loaded: LoadedRun, rounds: Iterable[RoundRecord], references: ReferencesRecord) -> list[str]:
    """Return the models that have been scored so far, by their names in the answer file."""
    scored = [record.server_round for record in rounds if record.evaluation is not None]
    models = [BASE] * (0 in scored) + [FEDERATED] * any(scored)
    return models + [one.name for one in wanted_runs(loaded) if getattr(references, one.name) is not None]
