"""Runs the algorithm: sample, broadcast, train, aggregate, evaluate, record. There is no other round loop."""

import dataclasses
from typing import Any

from flexlora.aggregators.base import check_state
from flexlora.rounds.aggregation import aggregate_cohort
from flexlora.rounds.checkpoint import (
    Checkpoint,
    drop_checkpoints,
    load_latest,
    replace_progress,
    save_checkpoint,
)
from flexlora.rounds.cohort import cohort_work
from flexlora.rounds.history import history_lines, line_in, write_history
from flexlora.rounds.loop_parts import Loop, Outcome, Progress, RoundEvent, Stopwatch
from flexlora.rounds.outcomes import round_record
from flexlora.rounds.records import (
    CHECKPOINTS_FOLDER,
    RECORDS_FILE,
    RecordsError,
    RoundRecord,
    append_record,
    from_line,
    line_digest,
    lines_of,
    to_line,
)


def run_rounds(loop: Loop) -> Outcome:
    """Run all rounds that are left and return how it ended.

    Everything needed to continue is in ``loop.folder``: a run that was killed continues from its newest checkpoint,
    writes the same records and ends with the same state as one that was not, times apart.
    """
    settings = loop.settings
    server_round, state, progress = _resumed(loop) or _started(loop)
    while server_round < settings.num_rounds and progress.stopped is None:
        server_round, before, watch = server_round + 1, progress, Stopwatch()
        with watch.stage("total"):
            work = cohort_work(loop, server_round, state, progress, watch)
            loop.notify(RoundEvent("cohort", server_round, len(work.clients)))
            came = aggregate_cohort(loop, server_round, work, state, watch)
            state, progress = came.state, work.progress.keeping(came.kept_by_clients)
            # A cohort drawn by Poisson sampling may be empty, which is no failure.
            if work.clients:
                progress = progress.after_updates(came.num_ok, settings.max_failed_rounds)
            if came.release is not None:
                progress = progress.after_release(came.release.spent, came.release.stopped)
            # What clients were sent is freed before the next round's broadcasts are made.
            del work
            record = round_record(loop, server_round, state, came.clients, came.note, watch, came.parts)
        record = record.model_copy(update=_end_of_round(loop, before, progress, watch))
        progress = _finish_round(loop, state, progress, record)
    has_progress = progress.num_updates > 0 and progress.failed_rounds_in_a_row < settings.max_failed_rounds
    return Outcome(state, server_round, progress.stopped, has_progress, progress.kept)


def _end_of_round(loop: Loop, before: Progress, after: Progress, watch: Stopwatch) -> dict[str, Any]:
    """Return what a round's record says once its training is over."""
    ended: dict[str, Any] = {"stopped": after.stopped, "seconds": watch.seconds}
    if loop.clock is not None:
        now = after.clock.now
        ended |= {"virtual_seconds": now - before.clock.now, "virtual_clock_seconds": now}
    return ended


def _resumed(loop: Loop) -> tuple[int, Any, Progress] | None:
    """Return round, state and progress of the newest checkpoint, with the records brought in line; None without one.

    A checkpoint whose round had yet to be scored is scored first. One whose earlier rounds have no records any more is
    passed over, as a damaged one is.
    """
    folder, recent = loop.folder / CHECKPOINTS_FOLDER, loop.settings.keep_checkpoints
    checkpoint = load_latest(folder, loop.state_types, lambda found: _remaining(loop, found), recent)
    if checkpoint is None:
        _refuse_to_forget(loop)
        return None
    progress, record, lines = _remaining(loop, checkpoint)
    server_round, state = checkpoint.server_round, checkpoint.state
    write_history(loop.folder / RECORDS_FILE, lines)
    progress = dataclasses.replace(progress, history=tuple(map(line_digest, lines)))
    if _is_unscored(loop, progress, record):
        return server_round, state, _finish_round(loop, state, progress, record, is_saved=True)
    gave_up = progress.failed_rounds_in_a_row >= loop.settings.max_failed_rounds
    if gave_up and server_round < loop.settings.num_rounds:
        # The cause may be gone by now: a resumed run tries again.
        progress = dataclasses.replace(progress, failed_rounds_in_a_row=0, stopped=None)
    return server_round, state, progress


def _remaining(loop: Loop, checkpoint: Checkpoint) -> tuple[Progress, RoundRecord, list[bytes]]:
    """Return progress and record of a checkpoint, and the lines of the record file that stay."""
    progress = Progress.from_json(checkpoint.progress["loop"], checkpoint.sent, checkpoint.kept)
    own, path, checkpoints = line_in(checkpoint.progress), loop.folder / RECORDS_FILE, loop.folder / CHECKPOINTS_FOLDER
    record = from_line(own)
    if record.server_round != checkpoint.server_round:
        raise RecordsError(f"a checkpoint of round {checkpoint.server_round} holds a record of {record.server_round}")
    if _is_unscored(loop, progress, record):
        lines = history_lines(path, record.server_round - 1, checkpoints, progress.history)
    else:
        lines = history_lines(path, record.server_round, checkpoints, progress.history, own)
    return progress, record, lines


def _is_unscored(loop: Loop, progress: Progress, record: RoundRecord) -> bool:
    return record.evaluation is None and _is_scored(loop, record.server_round, progress)


def _refuse_to_forget(loop: Loop) -> None:
    """Raise if there are rounds on record but no checkpoint: a run that began anew would lose them without a word.

    Raises:
        RecordsError: Naming what to do.
    """
    path = loop.folder / RECORDS_FILE
    lines = [line for line in lines_of(path) if line.strip()] if path.exists() else []
    if len(lines) > 1:
        raise RecordsError(
            f"{path} has records of {len(lines)} rounds, and {loop.folder / CHECKPOINTS_FOLDER} has no "
            "checkpoint to go on from: put a copy of it back, or start anew with --overwrite"
        )


def _started(loop: Loop) -> tuple[int, Any, Progress]:
    """Evaluate the base model as round 0, if anything is, and return round, first state and first progress."""
    loop.folder.mkdir(parents=True, exist_ok=True)
    (loop.folder / RECORDS_FILE).unlink(missing_ok=True)
    state = loop.aggregator.init(loop.federation.initial_adapter)
    # Before any work is done: what cannot be saved could not be resumed.
    check_state(state, loop.state_types)
    watch, scores = Stopwatch(), None
    if loop.evaluator is not None:
        loop.notify(RoundEvent("evaluating", 0))
        with watch.stage("evaluate"):
            scores = loop.evaluator.scores(None)
    started = None if loop.clock is None else 0.0
    record = RoundRecord(
        server_round=0, evaluation=scores, seconds=watch.seconds, virtual_seconds=started, virtual_clock_seconds=started
    )
    loss = None if scores is None else scores.validation_loss
    progress = Progress(best_validation_loss=loss, best_round=None if loss is None else 0)
    _save(loop, state, progress, record)
    progress = _recorded(loop, progress, record)
    loop.notify(RoundEvent("done", 0, record=record))
    return 0, state, progress


def _finish_round(
    loop: Loop, state: Any, progress: Progress, record: RoundRecord, *, is_saved: bool = False
) -> Progress:
    """Checkpoint and score a trained round where these are due, write its record and return the progress after it.

    The checkpoint comes first: an evaluation that kills the process, usually by running out of memory, must not cost
    the training. Scores are added to the checkpoint afterwards.

    Args:
        is_saved: Whether the round comes from its checkpoint.
    """
    settings, server_round = loop.settings, record.server_round
    # A checkpoint that cannot be read back would cost all rounds, and be noticed only when the run is resumed.
    check_state(state, loop.state_types)
    if not is_saved and (_is_last(loop, server_round, progress) or server_round % settings.checkpoint_every == 0):
        _save(loop, state, progress, record)
        is_saved = True
    if _is_scored(loop, server_round, progress):
        progress, record = _score_round(loop, state, progress, record)
        if is_saved:
            remembered = _remembered(loop, progress, record)
            replace_progress(loop.folder / CHECKPOINTS_FOLDER, server_round, remembered)
        elif progress.stopped is not None or progress.best_round == server_round:
            _save(loop, state, progress, record)
        drop_checkpoints(loop.folder / CHECKPOINTS_FOLDER, settings.keep_checkpoints, progress.best_round)
    progress = _recorded(loop, progress, record)
    loop.notify(RoundEvent("done", server_round, len(record.clients), record=record))
    return progress


def _recorded(loop: Loop, progress: Progress, record: RoundRecord) -> Progress:
    """Write the record of a round and return the progress that knows its line."""
    append_record(loop.folder / RECORDS_FILE, record)
    return dataclasses.replace(progress, history=(*progress.history, line_digest(to_line(record).encode())))


def _is_last(loop: Loop, server_round: int, progress: Progress) -> bool:
    return server_round == loop.settings.num_rounds or progress.stopped is not None


def _is_scored(loop: Loop, server_round: int, progress: Progress) -> bool:
    if loop.evaluator is None:
        return False
    return _is_last(loop, server_round, progress) or server_round % loop.settings.evaluate_every == 0


def _save(loop: Loop, state: Any, progress: Progress, record: RoundRecord) -> None:
    remembered = _remembered(loop, progress, record)
    checkpoint = Checkpoint(record.server_round, state, remembered, progress.sent, progress.kept)
    save_checkpoint(loop.folder / CHECKPOINTS_FOLDER, checkpoint, loop.settings.keep_checkpoints, progress.best_round)


def _remembered(loop: Loop, progress: Progress, record: RoundRecord) -> dict[str, Any]:
    # The record is part of the checkpoint, so a kill between the two writes loses neither.
    return {
        "loop": progress.to_json(),
        "record": to_line(record),
        "server_ranks": dict(loop.federation.server_ranks),
    }


def _score_round(loop: Loop, state: Any, progress: Progress, record: RoundRecord) -> tuple[Progress, RoundRecord]:
    """Return progress and record of a trained round with the scores of its global adapter."""
    settings, federation, server_round = loop.settings, loop.federation, record.server_round
    assert loop.evaluator is not None, "only rounds that are scored come here"
    watch = Stopwatch(dict(record.seconds))
    loop.notify(RoundEvent("evaluating", server_round, len(record.clients)))
    with watch.stage("total"), watch.stage("evaluate"):
        scores = loop.evaluator.scores(loop.aggregator.broadcast(state, federation.server_ranks))
        # A run that ends here anyway has not been stopped.
        patience = None if server_round == settings.num_rounds else settings.patience
        progress = progress.after_evaluation(server_round, scores.validation_loss, patience)
        if _is_last(loop, server_round, progress):
            groups = loop.evaluator.rank_groups(
                lambda plan: loop.aggregator.broadcast(state, plan.resolve(federation.shapes))
            )
            scores = scores.model_copy(update={"rank_groups": groups})
    update = {"evaluation": scores, "stopped": progress.stopped, "seconds": watch.seconds}
    return progress, record.model_copy(update=update)
