"""Says which rounds and ranks of a run an adapter can be taken from, by its records and file names alone."""

import logging
from contextlib import suppress
from pathlib import Path

from flexlora.experiment.config import Config
from flexlora.experiment.run_folder import ADAPTERS_FOLDER, ExperimentError
from flexlora.rounds.records import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    RECORDS_FILE,
    RecordsError,
    RoundRecord,
    read_manifest,
    read_records,
)
from flexlora.text import printable

log = logging.getLogger(__name__)


def check_checkpoints(run_folder: Path) -> None:
    """Raise unless a run has a checkpoint of a round that it has finished.

    Raises:
        ExperimentError: Saying whether it has not got so far, or its checkpoints are gone.
    """
    names = [path.name.removeprefix("round-") for path in (run_folder / CHECKPOINTS_FOLDER).glob("round-*")]
    if any(name.isdecimal() and int(name) > 0 for name in names):
        return
    records = _records(run_folder)
    if not records or records[-1].server_round == 0:
        raise ExperimentError(f"{run_folder} has no round to take an adapter from yet; let the run finish one")
    adapters = sorted(str(path) for path in (run_folder / ADAPTERS_FOLDER).glob("rank-*"))
    instead = f"take {', '.join(adapters)} as it is" if adapters else "run it again in another folder"
    raise ExperimentError(
        f"the checkpoints of {run_folder} are gone: it has records of {records[-1].server_round} rounds, and "
        f"{run_folder / CHECKPOINTS_FOLDER} holds none of them; put a copy of that folder back, or {instead}"
    )


def check_rank(rank: int | None, top: int) -> int:
    """Return a rank that the server has, its largest for None.

    Args:
        top: The server's largest rank.

    Raises:
        ExperimentError: If the rank is out of range.
    """
    if rank is not None and not 1 <= rank <= top:
        raise ExperimentError(f"the rank must be in 1..{top}, the server's rank in this run; got {rank}")
    return rank or top


def known_top_rank(config: Config, run_folder: Path) -> int | None:
    """Return the server's largest rank as far as the manifest of a run tells it, None where it does not."""
    try:
        manifest = read_manifest(run_folder / MANIFEST_FILE)
    except RecordsError:
        return None  # A checkpoint knows it too.
    ranks = [rank for plan in manifest.plan_ranks.values() for rank in plan.values()] if manifest else []
    return config.method.traits().server_rank or max(ranks, default=None)


def tell_of_later_rounds(run_folder: Path, server_round: int, checkpoint_every: int) -> None:
    """Log a warning if a run has got past the round of its newest checkpoint, which should be there.

    Args:
        server_round: Of the newest checkpoint that can be read.
        checkpoint_every: Rounds between checkpoints; the last round of a run has one too.
    """
    records = _records(run_folder)
    if not records:
        return
    last, num_rounds = records[-1], None
    with suppress(RecordsError):
        manifest = read_manifest(run_folder / MANIFEST_FILE)
        num_rounds = manifest.num_rounds if manifest else None
    missing = last.server_round - server_round
    has_ended = bool(last.stopped) or last.server_round == num_rounds
    if missing >= checkpoint_every or (missing > 0 and has_ended):
        log.warning(
            "%s has records of %d rounds, but its newest checkpoint is that of round %d, which is taken; put a copy "
            "of the later ones back if you have one",
            printable(str(run_folder)),
            last.server_round,
            server_round,
        )


def _records(run_folder: Path) -> list[RoundRecord]:
    try:
        return list(read_records(run_folder / RECORDS_FILE))
    except (RecordsError, OSError):
        return []  # What needs them says so.
