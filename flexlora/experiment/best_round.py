"""Finds the checkpoint of the best round of a run: that of the lowest validation loss, never of unseen tasks."""

from pathlib import Path
from typing import Literal

from flexlora.experiment.run_folder import ExperimentError
from flexlora.rounds.checkpoint import Checkpoint, load_round
from flexlora.rounds.records import CHECKPOINTS_FOLDER

WhichRound = Literal["last", "best"]


def best_checkpoint(run_folder: Path, newest: Checkpoint, types: tuple[type, ...]) -> Checkpoint:
    """Return the checkpoint of the round whose validation loss is lowest.

    Args:
        run_folder: The folder of the run.
        newest: Its newest checkpoint, which knows the best round.
        types: The dataclasses that states may be made of.

    Raises:
        ExperimentError: If the run had no validation set, no round is better than the base model, or the checkpoint
            of the best was not kept.
        CheckpointError: If that checkpoint is damaged.
    """
    progress = newest.progress["loop"]
    best, loss = progress.get("best_round"), progress.get("best_validation_loss")
    instead = "take the last round (--round last)"
    if loss is None:
        raise ExperimentError(
            f"the best round is that of the lowest validation loss, and {run_folder} has no validation set; "
            f"set data.validation_examples in a run of its own, or {instead}"
        )
    if best == 0:
        raise ExperimentError(
            f"no round of {run_folder} has a lower validation loss than its base model alone ({loss:.4f}); {instead}"
        )
    checkpoint = None if best is None else load_round(run_folder / CHECKPOINTS_FOLDER, best, types)
    if checkpoint is None:
        which = "its best round" if best is None else f"round {best}, its best,"
        raise ExperimentError(f"{run_folder} has no checkpoint of {which} to take an adapter from; {instead}")
    return checkpoint
