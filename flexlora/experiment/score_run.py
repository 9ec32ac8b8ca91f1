"""Scores the adapter of a finished run again."""

import re
from collections.abc import Sequence
from pathlib import Path

from flexlora.experiment.config_file import load_config
from flexlora.experiment.export import adapter_at_rank, final_state
from flexlora.experiment.loaded import LoadedRun
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.run_folder import CONFIG_FILE, ExperimentError, differences, read_run_config
from flexlora.experiment.scoring import Scorer
from flexlora.federation.messages import Broadcast
from flexlora.rounds.records import MANIFEST_FILE, EvaluationRecord, read_manifest

EVALUATION_KEYS = (
    r"data\.(path|cache|test_examples_per_task|max_length)|evaluation\..*|"
    r"model\.(device|dtype|num_threads|num_processes|attn_.*)|ray(\..*)?"
)


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
    changed = list(differences(before.model_dump(mode="json"), config.model_dump(mode="json")))
    # Anything else could turn a client's data into "unseen" tasks, or not fit the adapter.
    refused = [key for key in changed if not re.fullmatch(EVALUATION_KEYS, key)]
    if refused:
        raise ExperimentError(
            "eval can change data.path, data.cache, data.test_examples_per_task, data.max_length, evaluation.* and "
            f"where the model runs; got {', '.join(refused)}"
        )
    aggregator, state, server_ranks = final_state(config, run_folder)
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
    loaded = LoadedRun.load(config, participants)
    scorer = Scorer(loaded)
    adapter = aggregator.broadcast(state, server_ranks)
    if rank is not None:
        adapter = Broadcast(adapter_at_rank(adapter, rank, loaded.scaling))
    return {"base model": scorer.scores(None), f"rank {rank or top}": scorer.scores(adapter)}
