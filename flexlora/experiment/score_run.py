"""Scores the adapter of a finished run again."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flexlora.data.owned_examples import OwnedRow
from flexlora.experiment.base import resolve_device
from flexlora.experiment.best_round import WhichRound
from flexlora.experiment.config_file import load_config
from flexlora.experiment.config_sources import config_from
from flexlora.experiment.export import adapter_at_rank, saved_state
from flexlora.experiment.kept_rounds import check_rank
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.participants import Participants, gather_participants
from flexlora.experiment.run_folder import CONFIG_FILE, ExperimentError, read_run_config
from flexlora.experiment.score_changes import check_changes
from flexlora.experiment.scoring import Scorer, unseen_tasks
from flexlora.experiment.stages import Notify, Stage, Work, ignore
from flexlora.federation.messages import Broadcast
from flexlora.rounds.records import MANIFEST_FILE, EvaluationRecord, read_manifest


def evaluate_run(
    run_folder: Path | str,
    overrides: Sequence[str] | Mapping[str, object] = (),
    *,
    rank: int | None = None,
    which: WhichRound = "last",
    data: Iterable[OwnedRow] | None = None,
    notify: Notify = ignore,
) -> dict[str, EvaluationRecord]:
    """Score the base alone and with the adapter of a run on the run's unseen tasks.

    Args:
        run_folder: The folder of a run that has got past round 0.
        overrides: Settings that replace the run's, for example another ``data.path`` or more examples:
            ``["data.test_examples_per_task=50"]`` or ``{"data.test_examples_per_task": 50}``.
        rank: Cut the adapter to this rank first; None takes all of it.
        which: The last round, or the best: that of the lowest validation loss.
        data: The examples of a run whose data were passed from Python.
        notify: Told how far it is.

    Raises:
        ExperimentError: If the run has no checkpoint or the rank is out of range.
    """
    run_folder = Path(run_folder)
    path, before = run_folder / CONFIG_FILE, read_run_config(run_folder)
    is_mapping = isinstance(overrides, Mapping)
    config = config_from(path, overrides) if is_mapping else load_config(path, overrides, check_paths=True)
    check_changes(before, config)
    saved = saved_state(config, run_folder, which)
    name = f"rank {check_rank(rank, max(saved.server_ranks.values()))}"
    resolve_device(config.model.device)
    notify(Stage("Reading data"))
    participants = gather_participants(config, data)
    _check_data(participants, run_folder)
    loaded = LoadedRun.load(config, participants, notify)
    scorer = Scorer(loaded)
    # The base and the adapter.
    num_answers = 2 * sum(len(examples) for examples in unseen_tasks(loaded).values())
    notify(Stage(f"Scoring the base model and {name}", left=Work(answers=num_answers)))
    adapter = saved.aggregator.broadcast(saved.state, saved.server_ranks)
    if rank is not None:
        adapter = Broadcast(adapter_at_rank(adapter, rank, loaded.scaling))
    return {"base model": scorer.scores(None), name: scorer.scores(adapter)}


def _check_data(participants: Participants, run_folder: Path) -> None:
    """Raise if the clients' data are not those that the run was trained on."""
    manifest = read_manifest(run_folder / MANIFEST_FILE)
    if manifest is not None and participants.corpus.hashes["clients"] != manifest.data_hashes["clients"]:
        raise ExperimentError(
            "the data must be those the run was trained on, or data of its clients could count as unseen; restore "
            "data.path or data=, or hold other data out in a run of its own"
        )
