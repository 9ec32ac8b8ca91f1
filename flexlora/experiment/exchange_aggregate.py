"""Aggregates the replies of a round that lie in folders, and writes what the next round starts from.

The order of writes makes a kill harmless: what was used is listed, then the round's checkpoint appears, then its
record, then the next broadcasts. A second call finds what is missing and does that; one with the same replies changes
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexlora.engines.exchange_keys import private_key
from flexlora.engines.exchange_manifest import ExchangeError
from flexlora.experiment.exchange_replies import (
    FoundReplies,
    Refusal,
    find_replies,
    reply_folders,
    was_used,
    write_list,
)
from flexlora.experiment.exchange_run import ExchangeRun, held, open_exchange
from flexlora.experiment.export import write_run_adapters
from flexlora.experiment.method_failures import naming_failures
from flexlora.experiment.stages import Notify, Stage, ignore
from flexlora.report.page import REPORT_FILE, write_report
from flexlora.rounds.loop import run_rounds
from flexlora.rounds.loop_parts import Loop, Outcome
from flexlora.rounds.records import CHECKPOINTS_FOLDER, RECORDS_FILE, RoundRecord, read_records
from flexlora.text import count_text


@dataclass(frozen=True)
class AggregatedRound:
    """A round that is over.

    Attributes:
        server_round: Its number.
        num_rounds: How many the run has.
        used: Clients whose replies count in it.
        refused: Replies that do not, with the reason.
        is_repeat: Whether it was over before, and nothing was left to do but to say so.
        broadcasts: Folder with what the next round starts from; None after the last.
        record: Its line in the records.
    """

    server_round: int
    num_rounds: int
    used: tuple[str, ...]
    refused: tuple[Refusal, ...]
    is_repeat: bool
    broadcasts: Path | None
    record: RoundRecord


def aggregate_replies(
    folder: Path | str,
    replies: Sequence[Path | str],
    *,
    min_clients: int = 1,
    key: Path | None = None,
    notify: Notify = ignore,
) -> AggregatedRound:
    """Aggregate the replies of the round that a run waits for, and write the broadcasts of the next.

    Args:
        folder: Of a run that ``begin_exchange`` made.
        replies: Folders of replies, or folders with such folders in them.
        min_clients: Fewest replies that can be used; with fewer, nothing changes.
        key: The server's private key, with which broadcasts are signed; None signs nothing.
        notify: Told about each step.

    Raises:
        ExchangeError: If fewer than ``min_clients`` replies can be used, or all rounds are over.
        ExperimentError: If ``folder`` is no run.
    """
    folder = Path(folder)
    if key is not None:
        private_key(key)
    places = reply_folders(Path(place) for place in replies)
    run = open_exchange(folder, notify)
    with held(folder):
        done = _completed(run, key)
        if done.server_round and was_used(run, done.server_round, places):
            return _told(run, done.server_round, FoundReplies({}, {}), is_repeat=True)
        if done.server_round >= run.config.rounds.num_rounds:
            raise ExchangeError(
                f"all {count_text(done.server_round, 'round')} of {folder} are over; flexlora export {folder} "
                "takes the adapter out"
            )
        server_round = done.server_round + 1
        notify(Stage(f"Checking {len(places)} replies of round {server_round}"))
        found = find_replies(run, done.state, server_round, places)
        if len(found.usable) < max(1, min_clients):
            raise _too_few(server_round, found, max(1, min_clients))
        notify(Stage(f"Aggregating the updates of {count_text(len(found.usable), 'client')}"))
        write_list(run, server_round, found)
        loop = run.loop(server_round, found.clients(run), found.engine(run))
        with naming_failures(run.aggregator, run.config.method.name):
            outcome = run_rounds(loop)
        _after(run, loop, outcome, key)
        return _told(run, server_round, found, is_repeat=False)


def _completed(run: ExchangeRun, key: Path | None) -> Outcome:
    """Do what a call that was killed has left undone and return where the run stands."""
    names = [path.name.removeprefix("round-") for path in (run.folder / CHECKPOINTS_FOLDER).glob("round-*")]
    last = max((int(name) for name in names if name.isdecimal()), default=None)
    if last is None:
        raise ExchangeError(f"{run.folder} has no checkpoint to go on from; put a copy of its checkpoints back")
    loop = run.loop(last)
    outcome = run_rounds(loop)
    _after(run, loop, outcome, key)
    return outcome


def _after(run: ExchangeRun, loop: Loop, outcome: Outcome, key: Path | None) -> None:
    """Write what follows a round: the broadcasts of the next, or the run's adapters and report."""
    if outcome.server_round < run.config.rounds.num_rounds:
        run.write_broadcasts(outcome.state, outcome.server_round + 1, key)
    elif not (run.folder / REPORT_FILE).is_file():
        if outcome.has_progress:
            write_run_adapters(run, loop, outcome, run.folder)
        write_report(run.folder)


def _told(run: ExchangeRun, server_round: int, found: FoundReplies, *, is_repeat: bool) -> AggregatedRound:
    record = next(one for one in read_records(run.folder / RECORDS_FILE) if one.server_round == server_round)
    is_last = server_round == run.config.rounds.num_rounds
    return AggregatedRound(
        server_round=server_round,
        num_rounds=run.config.rounds.num_rounds,
        used=tuple(client.client_id for client in record.clients if client.outcome == "ok"),
        refused=tuple(found.refused),
        is_repeat=is_repeat,
        broadcasts=None if is_last else run.broadcasts(server_round + 1),
        record=record,
    )


def _too_few(server_round: int, found: FoundReplies, min_clients: int) -> ExchangeError:
    num_usable = len(found.usable)
    reasons = [f"{one.folder.name}: {one.reason}" for one in found.refused]
    return ExchangeError(
        f"round {server_round} needs replies of {count_text(min_clients, 'client')} that can be used; got "
        f"{num_usable}, and nothing was changed:",
        *(f"  - {reason}" for reason in reasons),
    )
