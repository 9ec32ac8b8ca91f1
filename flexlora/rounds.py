"""The algorithm: sample, broadcast, train, aggregate, evaluate, record. The only round loop there is."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from flexlora import FlexLoraError
from flexlora.aggregators.base import AggregationError, Aggregator, ChangeAggregator
from flexlora.buffering import fill_buffer, still_needed
from flexlora.checkpoint import Checkpoint, load_latest, replace_progress, save_checkpoint
from flexlora.clients import (
    Broadcast,
    Change,
    ClientFailure,
    ClientSpec,
    RankPlan,
    Update,
    compact_ranks,
    sample_cohort,
    stream_seed,
)
from flexlora.clock import Breakdown, Clock, ClockState, Trip, close_round, open_round, start_trip
from flexlora.engines.base import Engine
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.lora.product import ProductSum, Spectrum, add_product, decompose
from flexlora.report.records import (
    RECORDS_FILE,
    ClientRecord,
    EvaluationRecord,
    RankGroupRecord,
    RoundRecord,
    SpectrumRecord,
    append_record,
    keep_rounds,
    read_records,
    to_line,
)
from flexlora.uplink.base import UplinkStep, receive
from flexlora.uplink.wire import UpdateError, WireDtype, check_update, decode_broadcast, encode, encode_broadcast

log = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
SIGNIFICANT_DIGITS = 6


@dataclass(frozen=True)
class RoundSettings:
    """How long the loop runs and what it keeps; the fields are those of ``rounds`` in the configuration."""

    num_rounds: int
    cohort_size: int
    seed: int
    evaluate_every: int = 1
    patience: int | None = None
    max_failed_rounds: int = 3
    keep_checkpoints: int = 2
    checkpoint_every: int = 1


@dataclass(frozen=True)
class Federation:
    """Who takes part, with what: all that stays the same over the rounds.

    Attributes:
        clients: Everybody who can be sampled.
        shapes: Module path -> (out_features, in_features) of every adapted module.
        server_ranks: Module path -> rank of the global adapter that is evaluated and exported.
        initial_adapter: PEFT's initial factors at the server ranks.
        scaling: The rule every client's scaling follows.
        wire_dtype: In which factors travel.
    """

    clients: Sequence[ClientSpec]
    shapes: Mapping[str, tuple[int, int]]
    server_ranks: Mapping[str, int]
    initial_adapter: AdapterState
    scaling: Scaling
    wire_dtype: WireDtype = "float32"


@dataclass(frozen=True)
class Progress:
    """What the loop remembers besides the aggregator's state.

    Attributes:
        clock: Where virtual time stands, if it is simulated.
        sent: What clients that are still at work were sent, by ``_sent_name``; checkpointed as tensors.
    """

    best_validation_loss: float | None = None
    evaluations_without_gain: int = 0
    failed_rounds_in_a_row: int = 0
    num_updates: int = 0
    stopped: str | None = None
    clock: ClockState = field(default_factory=ClockState)
    sent: Mapping[str, Broadcast] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the tensors as plain values."""
        return dataclasses.asdict(dataclasses.replace(self, sent={}))

    @staticmethod
    def from_json(values: Mapping[str, Any], sent: Mapping[str, Broadcast]) -> "Progress":
        """Return the progress whose plain values these are; those that earlier versions lack have their defaults."""
        clock = dict(values.get("clock", {}))
        trips = []
        for trip in clock.pop("trips", ()):
            breakdown = trip["breakdown"] and Breakdown(**trip["breakdown"])
            trips.append(Trip(**{**trip, "breakdown": breakdown}))
        state = ClockState(**clock, trips=tuple(trips))
        return Progress(**{**values, "clock": state, "sent": sent})


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        state: The aggregator's state after the last round.
        server_round: That round.
        stopped: Why it ended before ``num_rounds``, or None.
        has_progress: Whether any client's update was ever aggregated and the run did not end in failures.
    """

    state: Any
    server_round: int
    stopped: str | None
    has_progress: bool


@dataclass(frozen=True)
class RoundEvent:
    """What a display may show while a round is running.

    Attributes:
        kind: ``cohort`` (sampled), ``client`` (one outcome arrived), ``evaluating`` or ``done``.
        server_round: The round it belongs to.
        num_clients: Size of the cohort.
        client: The outcome, for ``client``.
        record: The record, for ``done``.
    """

    kind: Literal["cohort", "client", "evaluating", "done"]
    server_round: int
    num_clients: int = 0
    client: ClientRecord | None = None
    record: RoundRecord | None = None


@runtime_checkable
class Evaluator(Protocol):
    """Scores models while the loop runs."""

    def scores(self, adapter: Broadcast | None) -> EvaluationRecord:
        """Return the scores of the base with this adapter, or of the base alone for None."""
        ...

    def rank_groups(self, broadcast: Callable[[RankPlan], Broadcast]) -> dict[str, RankGroupRecord]:
        """Return how each kind of client is served, once, after the last round."""
        ...


@dataclass(frozen=True)
class Loop:
    """Everything a run is made of.

    Attributes:
        aggregator: The method.
        state_types: The dataclasses its states are made of, for reading checkpoints.
        engine: What trains a cohort.
        federation: Who takes part, with what.
        settings: How long and how often.
        learning_rate: Round -> learning rate, for the record; the engine uses the same function.
        evaluator: Scores the global adapter.
        folder: Where ``records.jsonl`` and ``checkpoints/`` are.
        notify: Told about each step, for progress displays.
        uplink: The steps whose client ends the engine runs, in the same order; their server ends run here.
        clock: Decides who is there, who is late and how long a round takes, in virtual time; None lets everybody be
            there and in time.
    """

    aggregator: Aggregator[Any]
    state_types: tuple[type, ...]
    engine: Engine
    federation: Federation
    settings: RoundSettings
    learning_rate: Callable[[int], float]
    evaluator: Evaluator
    folder: Path
    notify: Callable[[RoundEvent], None] = lambda event: None
    uplink: Sequence[UplinkStep] = ()
    clock: Clock | None = None


@dataclass(frozen=True)
class _Batch:
    """Clients that start from the broadcasts of one round."""

    server_round: int
    cohort: Sequence[ClientSpec]
    broadcasts: Mapping[RankPlan, Broadcast]


@dataclass(frozen=True)
class _Work:
    """What a round has to do.

    Attributes:
        batches: Who trains, from what.
        lost: Who was sampled and does not get to the server.
        progress: As it is once they are back.
        trips: Client id -> its way on the virtual clock, if there is one.
        adds_changes: Updates count by what they changed, discounted by their staleness.
    """

    batches: Sequence[_Batch]
    progress: Progress
    lost: Sequence[ClientFailure] = ()
    trips: Mapping[str, Trip] = field(default_factory=dict)
    adds_changes: bool = False

    @property
    def num_clients(self) -> int:
        return len(self.lost) + sum(len(batch.cohort) for batch in self.batches)


@dataclass
class _Stopwatch:
    """Wall seconds per stage of one round."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def run_rounds(loop: Loop) -> Outcome:
    """Run all rounds that are left and return how it ended.

    Everything needed to go on is in ``loop.folder``: a run that was killed continues from its newest checkpoint, writes
    the same records and ends with the same state as one that was not, times apart.
    """
    settings = loop.settings
    server_round, state, progress = _resumed(loop) or _started(loop)
    while server_round < settings.num_rounds and progress.stopped is None:
        server_round += 1
        state, progress, record = _train_round(loop, server_round, state, progress)
        progress = _finish_round(loop, state, progress, record)
    has_progress = progress.num_updates > 0 and progress.failed_rounds_in_a_row < settings.max_failed_rounds
    return Outcome(state, server_round, progress.stopped, has_progress)


def _resumed(loop: Loop) -> tuple[int, Any, Progress] | None:
    """Return round, state and progress of the newest checkpoint, with the records brought in line; None without one.

    A checkpoint whose round had yet to be scored is scored first.
    """
    checkpoint = load_latest(loop.folder / CHECKPOINTS_FOLDER, loop.state_types)
    if checkpoint is None:
        return None
    server_round, state, records = checkpoint.server_round, checkpoint.state, loop.folder / RECORDS_FILE
    progress = Progress.from_json(checkpoint.progress["loop"], checkpoint.sent)
    record = RoundRecord.model_validate_json(checkpoint.progress["record"])
    if record.evaluation is None and _is_scored(loop, server_round, progress):
        keep_rounds(records, server_round - 1)
        return server_round, state, _finish_round(loop, state, progress, record, is_saved=True)
    keep_rounds(records, server_round)
    written = read_records(records)
    if not written or written[-1].server_round < server_round:
        append_record(records, record)
    gave_up = progress.failed_rounds_in_a_row >= loop.settings.max_failed_rounds
    if gave_up and server_round < loop.settings.num_rounds:
        # The cause may have been mended meanwhile: a resumed run tries again.
        progress = dataclasses.replace(progress, failed_rounds_in_a_row=0, stopped=None)
    return server_round, state, progress


def _started(loop: Loop) -> tuple[int, Any, Progress]:
    """Evaluate the base model as round 0 and return that round, the first state and the first progress."""
    loop.folder.mkdir(parents=True, exist_ok=True)
    (loop.folder / RECORDS_FILE).unlink(missing_ok=True)
    watch = _Stopwatch()
    loop.notify(RoundEvent("evaluating", 0))
    with watch.stage("evaluate"):
        scores = loop.evaluator.scores(None)
    started = None if loop.clock is None else 0.0
    record = RoundRecord(
        server_round=0, evaluation=scores, seconds=watch.seconds, virtual_seconds=started, virtual_clock_seconds=started
    )
    progress = Progress(best_validation_loss=scores.validation_loss)
    state = loop.aggregator.init(loop.federation.initial_adapter)
    _save(loop, state, progress, record)
    append_record(loop.folder / RECORDS_FILE, record)
    loop.notify(RoundEvent("done", 0, record=record))
    return 0, state, progress


def _finish_round(
    loop: Loop, state: Any, progress: Progress, record: RoundRecord, *, is_saved: bool = False
) -> Progress:
    """Checkpoint and score a trained round, each where it is due, write its record and return the progress after it.

    The checkpoint comes first: an evaluation that takes the process down, for want of memory most of all, must not take
    the training along. Scores are added to it afterwards.

    Args:
        is_saved: The round comes from its checkpoint.
    """
    settings, server_round = loop.settings, record.server_round
    if not is_saved and (_is_last(loop, server_round, progress) or server_round % settings.checkpoint_every == 0):
        _save(loop, state, progress, record)
        is_saved = True
    if _is_scored(loop, server_round, progress):
        progress, record = _score_round(loop, state, progress, record)
        if is_saved:
            remembered = _remembered(loop, progress, record)
            replace_progress(loop.folder / CHECKPOINTS_FOLDER, server_round, remembered)
        elif progress.stopped is not None:
            _save(loop, state, progress, record)
    append_record(loop.folder / RECORDS_FILE, record)
    loop.notify(RoundEvent("done", server_round, len(record.clients), record=record))
    return progress


def _is_last(loop: Loop, server_round: int, progress: Progress) -> bool:
    return server_round == loop.settings.num_rounds or progress.stopped is not None


def _is_scored(loop: Loop, server_round: int, progress: Progress) -> bool:
    return _is_last(loop, server_round, progress) or server_round % loop.settings.evaluate_every == 0


def _save(loop: Loop, state: Any, progress: Progress, record: RoundRecord) -> None:
    checkpoint = Checkpoint(record.server_round, state, _remembered(loop, progress, record), progress.sent)
    save_checkpoint(loop.folder / CHECKPOINTS_FOLDER, checkpoint, loop.settings.keep_checkpoints)


def _remembered(loop: Loop, progress: Progress, record: RoundRecord) -> dict[str, Any]:
    # The record travels inside the checkpoint, so that being killed between the two writes loses neither.
    return {
        "loop": progress.to_json(),
        "record": to_line(record),
        "server_ranks": dict(loop.federation.server_ranks),
    }


def _train_round(loop: Loop, server_round: int, state: Any, progress: Progress) -> tuple[Any, Progress, RoundRecord]:
    """Return state, progress and record after a round that has not been scored."""
    settings, federation, watch = loop.settings, loop.federation, _Stopwatch()
    with watch.stage("total"):
        work = _cohort_work(loop, server_round, state, progress, watch)
        loop.notify(RoundEvent("cohort", server_round, work.num_clients))
        state, clients, problem = _train_cohort(loop, server_round, state, work, watch)
        began, progress = progress.clock.now, work.progress
        num_updates = sum(client.outcome == "ok" for client in clients) if problem is None else 0
        progress = _count_updates(progress, num_updates, settings.max_failed_rounds)
        with watch.stage("spectra"):
            spectra = loop.aggregator.spectra(state)
            plans = sorted({client.plan for client in federation.clients}, key=lambda plan: plan.name)
            kept = {plan.name: share_inside(spectra, plan.resolve(federation.shapes)) for plan in plans}
    record = RoundRecord(
        server_round=server_round,
        learning_rate=loop.learning_rate(server_round),
        clients=clients,
        up_bytes=sum(client.up_bytes for client in clients),
        down_bytes=sum(client.down_bytes for client in clients),
        num_ok=sum(client.outcome == "ok" for client in clients),
        num_failed=sum(client.outcome == "failed" for client in clients),
        train_loss=_mean_loss(clients),
        spectra={
            module: SpectrumRecord(
                singular_values=[_rounded(value) for value in spectrum.S.tolist()], tail=_rounded(spectrum.tail)
            )
            for module, spectrum in spectra.items()
        },
        energy_kept={name: _rounded(share) for name, share in kept.items()},
        energy_above_smallest=_rounded(1.0 - min(kept.values())),
        note=problem,
        stopped=progress.stopped,
        seconds=watch.seconds,
        virtual_seconds=None if loop.clock is None else progress.clock.now - began,
        virtual_clock_seconds=None if loop.clock is None else progress.clock.now,
    )
    return state, progress, record


def _score_round(loop: Loop, state: Any, progress: Progress, record: RoundRecord) -> tuple[Progress, RoundRecord]:
    """Return progress and record of a trained round with the scores of its global adapter."""
    settings, federation, server_round = loop.settings, loop.federation, record.server_round
    watch = _Stopwatch(dict(record.seconds))
    loop.notify(RoundEvent("evaluating", server_round, len(record.clients)))
    with watch.stage("total"), watch.stage("evaluate"):
        scores = loop.evaluator.scores(loop.aggregator.broadcast(state, federation.server_ranks))
        # A run that is through anyway has not been stopped.
        patience = None if server_round == settings.num_rounds else settings.patience
        progress = _watch_validation(progress, scores, patience)
        if _is_last(loop, server_round, progress):
            groups = loop.evaluator.rank_groups(
                lambda plan: loop.aggregator.broadcast(state, plan.resolve(federation.shapes))
            )
            scores = scores.model_copy(update={"rank_groups": groups})
    update = {"evaluation": scores, "stopped": progress.stopped, "seconds": watch.seconds}
    return progress, record.model_copy(update=update)


def _cohort_work(loop: Loop, server_round: int, state: Any, progress: Progress, watch: _Stopwatch) -> _Work:
    """Return who trains in a round, from what, and who is lost on the way."""
    settings, clients, clock = loop.settings, loop.federation.clients, loop.clock
    if clock is None:
        cohort = sample_cohort(clients, settings.cohort_size, settings.seed, server_round)
        return _Work([_Batch(server_round, cohort, _broadcasts(loop, state, cohort, watch))], progress)
    if clock.policy.name == "async":
        return _buffered_work(loop, clock, server_round, state, progress, watch)
    begins, cohort = open_round(clock, clients, settings.cohort_size, server_round, progress.clock.now)
    broadcasts = _broadcasts(loop, state, cohort, watch)
    sizes = {plan: _sizes(broadcast, loop.federation.wire_dtype) for plan, broadcast in broadcasts.items()}
    trips = [start_trip(clock, client, server_round, begins, *sizes[client.plan]) for client in cohort]
    closed = close_round(clock.policy, trips, settings.cohort_size, begins)
    arrived = set(closed.arrived)
    return _Work(
        [_Batch(server_round, [client for client in cohort if client.client_id in arrived], broadcasts)],
        dataclasses.replace(progress, clock=ClockState(closed.ends)),
        closed.lost,
        {trip.client_id: trip for trip in trips},
    )


def _buffered_work(
    loop: Loop, clock: Clock, server_round: int, state: Any, progress: Progress, watch: _Stopwatch
) -> _Work:
    """Return the same for a server that does not wait: clients come back with what they were sent rounds ago."""
    federation = loop.federation
    by_id = {client.client_id: client for client in federation.clients}
    fresh: dict[RankPlan, Broadcast] = {}
    sizes: dict[RankPlan, tuple[int, int]] = {}

    def sizes_of(plan: RankPlan) -> tuple[int, int]:
        if plan not in sizes:
            with watch.stage("broadcast"):
                broadcast = loop.aggregator.broadcast(state, plan.resolve(federation.shapes))
                sizes[plan] = _sizes(broadcast, federation.wire_dtype)
                # As it arrives: a change is against that, and a checkpoint gives back the same strides, without which
                # a resumed run would round differently.
                fresh[plan] = decode_broadcast(encode_broadcast(broadcast, federation.wire_dtype))
        return sizes[plan]

    concurrency, before = loop.settings.cohort_size, progress.clock
    filled = fill_buffer(clock, federation.clients, concurrency, server_round, before, sizes_of)
    sent = dict(progress.sent) | {_sent_name(server_round, plan): broadcast for plan, broadcast in fresh.items()}
    batches = []
    for number in sorted({trip.server_round for trip in filled.arrived}):
        ids = sorted(trip.client_id for trip in filled.arrived if trip.server_round == number)
        cohort = [by_id[client_id] for client_id in ids]
        plans = {client.plan for client in cohort}
        batches.append(_Batch(number, cohort, {plan: sent[_sent_name(number, plan)] for plan in plans}))
    needed = {
        _sent_name(number, by_id[client_id].plan)
        for client_id, number in still_needed(clock, filled.state, server_round)
    }
    kept = {name: broadcast for name, broadcast in sent.items() if name in needed}
    trips = {trip.client_id: trip for trip in (*filled.arrived, *filled.gone)}
    return _Work(
        batches, dataclasses.replace(progress, clock=filled.state, sent=kept), filled.lost, trips, adds_changes=True
    )


def _sent_name(server_round: int, plan: RankPlan) -> str:
    return f"{server_round}/{plan.name}"


def _broadcasts(loop: Loop, state: Any, cohort: Sequence[ClientSpec], watch: _Stopwatch) -> dict[RankPlan, Broadcast]:
    with watch.stage("broadcast"):
        plans = dict.fromkeys(client.plan for client in cohort)
        return {plan: loop.aggregator.broadcast(state, plan.resolve(loop.federation.shapes)) for plan in plans}


def _sizes(broadcast: Broadcast, wire_dtype: WireDtype) -> tuple[int, int]:
    """Return the bytes of a broadcast and of the update that it will come back as."""
    return len(encode_broadcast(broadcast, wire_dtype)), len(encode(broadcast.trainable, wire_dtype))


def _train_cohort(
    loop: Loop, server_round: int, state: Any, work: _Work, watch: _Stopwatch
) -> tuple[Any, list[ClientRecord], str | None]:
    """Return the state after the updates, folded as they arrive, each client's outcome, and what went wrong.

    What a client sent is checked before any uplink step receives it: a step may fold the cohort into one update, in
    which nobody could tell a broken one. What the steps make of it is for the aggregator to check.
    """
    shapes = loop.federation.shapes
    batch_of = {client.client_id: batch for batch in work.batches for client in batch.cohort}
    due = batch_of.keys() | {outcome.client_id for outcome in work.lost}
    by_id = {client.client_id: client for client in loop.federation.clients if client.client_id in due}
    ranks = {plan: plan.resolve(shapes) for plan in {client.plan for client in by_id.values()}}
    clients: list[ClientRecord] = []
    recorded: set[str] = set()

    def outcomes() -> Iterator[Update | ClientFailure]:
        for batch in work.batches:
            trained = loop.engine.train(batch.server_round, batch.cohort, batch.broadcasts)
            while True:
                with watch.stage("train"):
                    outcome = next(trained, None)
                if outcome is None:
                    break
                yield outcome
        for client_id in sorted(batch_of.keys() - recorded):
            yield ClientFailure(client_id, "train", "the engine gave no outcome for this client")

    def note(client: ClientSpec, outcome: Update | ClientFailure) -> None:
        trip = work.trips.get(client.client_id)
        record = _client_record(client, ranks[client.plan], shapes, outcome)
        if trip is not None:
            record = record.model_copy(update=_on_the_clock(client, trip, server_round))
        clients.append(record)
        recorded.add(client.client_id)
        loop.notify(RoundEvent("client", server_round, work.num_clients, client=record))

    def survivors() -> Iterator[Update]:
        for outcome in outcomes():
            client = by_id.get(str(outcome.client_id))
            if client is None or client.client_id in recorded:
                log.warning("round %d: dropped an outcome of %r, who is not due", server_round, outcome.client_id)
                continue
            if isinstance(outcome, Update):
                outcome = _validated(outcome, ranks[client.plan], loop.federation)
            note(client, outcome)
            if isinstance(outcome, Update):
                yield outcome

    for outcome in work.lost:
        note(by_id[outcome.client_id], outcome)
    updates = survivors()
    first = next(updates, None)
    if first is None:
        return state, clients, "no client survived; the state was kept"
    before, problem = watch.seconds["train"], None
    rng = torch.Generator().manual_seed(stream_seed(loop.settings.seed, "uplink", server_round))
    try:
        with watch.stage("aggregate"):
            received = receive(loop.uplink, chain([first], updates), rng)
            if work.adds_changes:
                state = _add_changes(loop, server_round, state, received, by_id, batch_of)
            else:
                state = loop.aggregator.aggregate(state, received)
    except FlexLoraError as error:
        problem = f"the updates could not be aggregated and the state was kept: {error}"
    # The aggregator waits for clients while it folds; that time is theirs.
    watch.seconds["aggregate"] -= watch.seconds["train"] - before
    for _ in updates:
        pass  # Clients that nobody asked for any more belong into the record too.
    return state, clients, problem


def _add_changes(
    loop: Loop,
    server_round: int,
    state: Any,
    updates: Iterable[Update],
    by_id: Mapping[str, ClientSpec],
    batch_of: Mapping[str, _Batch],
) -> Any:
    """Return the state with what the updates changed against what their clients were sent, however long ago.

    Raises:
        AggregationError: If an update is not that of one client.
    """
    assert loop.clock is not None and isinstance(loop.aggregator, ChangeAggregator), "the configuration is checked"
    policy = loop.clock.policy

    def changes() -> Iterator[Change]:
        for update in updates:
            batch = batch_of.get(str(update.client_id))
            if batch is None:
                raise AggregationError(
                    "clock.policy=async must know whose an update is, but an uplink step folded several into one; "
                    "leave the step out or choose another clock.policy"
                )
            start = batch.broadcasts[by_id[str(update.client_id)].plan].trainable
            yield Change(update, start, policy.discount(server_round - batch.server_round))

    return loop.aggregator.add_changes(state, changes())


def _on_the_clock(client: ClientSpec, trip: Trip, server_round: int) -> dict[str, Any]:
    """Return what a client's record says about its device and its time."""
    seconds, staleness = _rounded(trip.seconds), server_round - trip.server_round
    return {"device": client.device, "virtual_seconds": seconds, "staleness": staleness}


def _validated(update: Update, ranks: Mapping[str, int], federation: Federation) -> Update | ClientFailure:
    """Return the update, or the failure it amounts to when the server cannot use it."""
    try:
        check_update(update.payload, ranks, federation.shapes, federation.scaling, federation.wire_dtype)
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise UpdateError(f"weight must be positive and finite; got {update.weight}")
    except UpdateError as error:
        return ClientFailure(str(update.client_id), "validate", str(error), update.down_bytes, update.up_bytes)
    return update


def _client_record(
    client: ClientSpec,
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    outcome: Update | ClientFailure,
) -> ClientRecord:
    known = {
        "client_id": client.client_id,
        "plan": client.plan.name,
        "ranks": compact_ranks(ranks, shapes),
        "num_examples": client.num_examples,
        "down_bytes": outcome.down_bytes,
        "up_bytes": outcome.up_bytes,
    }
    if isinstance(outcome, ClientFailure):
        return ClientRecord(**known, outcome="failed", stage=outcome.stage, reason=outcome.reason)
    steps = outcome.metrics.get("steps")
    return ClientRecord(
        **known,
        outcome="ok",
        loss=_rounded(outcome.metrics["loss"]) if "loss" in outcome.metrics else None,
        steps=None if steps is None else int(steps),
    )


def _count_updates(progress: Progress, num_updates: int, max_failed_rounds: int) -> Progress:
    failed_in_a_row = 0 if num_updates else progress.failed_rounds_in_a_row + 1
    stopped = progress.stopped
    if failed_in_a_row >= max_failed_rounds:
        stopped = f"every client failed in {failed_in_a_row} rounds in a row (rounds.max_failed_rounds)"
    return dataclasses.replace(
        progress,
        failed_rounds_in_a_row=failed_in_a_row,
        num_updates=progress.num_updates + num_updates,
        stopped=stopped,
    )


def _watch_validation(progress: Progress, scores: EvaluationRecord, patience: int | None) -> Progress:
    loss, best = scores.validation_loss, progress.best_validation_loss
    if loss is None:
        return progress
    if best is None or loss < best:
        return dataclasses.replace(progress, best_validation_loss=loss, evaluations_without_gain=0)
    without_gain = progress.evaluations_without_gain + 1
    stopped = progress.stopped
    if patience is not None and without_gain >= patience and stopped is None:
        stopped = f"validation loss did not fall below {best:.4f} in {without_gain} evaluations (rounds.patience)"
    return dataclasses.replace(progress, evaluations_without_gain=without_gain, stopped=stopped)


def _mean_loss(clients: Sequence[ClientRecord]) -> float | None:
    scored = [client for client in clients if client.loss is not None]
    total = sum(client.num_examples for client in scored)
    return _rounded(sum(client.num_examples * client.loss for client in scored) / total) if total else None  # type: ignore[operator]


def adapter_spectra(adapter: Broadcast) -> dict[str, Spectrum]:
    """Return the singular value decomposition of each module's change, trained and frozen part together."""
    frozen = adapter.frozen or {}
    spectra = {}
    for module, factors in adapter.trainable.items():
        total = add_product(ProductSum(*factors.shape), factors, 1.0)
        if module in frozen:
            total = add_product(total, frozen[module], 1.0)
        spectra[module] = decompose(total)
    return spectra


def share_inside(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Return the share (0 to 1) of the squared singular values of all modules inside these ranks; 1 if all are 0."""
    total = sum(float(spectrum.S.square().sum()) + spectrum.tail**2 for spectrum in spectra.values())
    inside = sum(float(spectrum.S[: ranks.get(module, 0)].square().sum()) for module, spectrum in spectra.items())
    return inside / total if total else 1.0


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
