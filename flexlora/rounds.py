"""The algorithm: sample, broadcast, train, aggregate, evaluate, record. The only round loop there is."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from flexlora import FlexLoraError
from flexlora.aggregators.base import Aggregator
from flexlora.checkpoint import Checkpoint, load_latest, replace_progress, save_checkpoint
from flexlora.clients import (
    Broadcast,
    ClientFailure,
    ClientSpec,
    RankPlan,
    Update,
    compact_ranks,
    sample_cohort,
    stream_seed,
)
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
from flexlora.uplink.wire import UpdateError, WireDtype, check_update

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
    """What the loop remembers besides the aggregator's state."""

    best_validation_loss: float | None = None
    evaluations_without_gain: int = 0
    failed_rounds_in_a_row: int = 0
    num_updates: int = 0
    stopped: str | None = None


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
    progress = Progress(**checkpoint.progress["loop"])
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
    record = RoundRecord(server_round=0, evaluation=scores, seconds=watch.seconds)
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
    checkpoint = Checkpoint(record.server_round, state, _remembered(loop, progress, record))
    save_checkpoint(loop.folder / CHECKPOINTS_FOLDER, checkpoint, loop.settings.keep_checkpoints)


def _remembered(loop: Loop, progress: Progress, record: RoundRecord) -> dict[str, Any]:
    # The record travels inside the checkpoint, so that being killed between the two writes loses neither.
    return {
        "loop": dataclasses.asdict(progress),
        "record": to_line(record),
        "server_ranks": dict(loop.federation.server_ranks),
    }


def _train_round(loop: Loop, server_round: int, state: Any, progress: Progress) -> tuple[Any, Progress, RoundRecord]:
    """Return state, progress and record after a round that has not been scored."""
    settings, federation, watch = loop.settings, loop.federation, _Stopwatch()
    with watch.stage("total"):
        cohort = sample_cohort(federation.clients, settings.cohort_size, settings.seed, server_round)
        loop.notify(RoundEvent("cohort", server_round, len(cohort)))
        state, clients, problem = _train_cohort(loop, server_round, state, cohort, watch)
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


def _train_cohort(
    loop: Loop, server_round: int, state: Any, cohort: Sequence[ClientSpec], watch: _Stopwatch
) -> tuple[Any, list[ClientRecord], str | None]:
    """Return the state after the updates, folded as they arrive, each client's outcome, and what went wrong.

    What a client sent is checked before any uplink step receives it: a step may fold the cohort into one update, in
    which nobody could tell a broken one. What the steps make of it is for the aggregator to check.
    """
    shapes = loop.federation.shapes
    with watch.stage("broadcast"):
        ranks = {plan: plan.resolve(shapes) for plan in dict.fromkeys(client.plan for client in cohort)}
        broadcasts = {plan: loop.aggregator.broadcast(state, plan_ranks) for plan, plan_ranks in ranks.items()}
    by_id = {client.client_id: client for client in cohort}
    clients: list[ClientRecord] = []

    def outcomes() -> Iterator[Update | ClientFailure]:
        trained = loop.engine.train(server_round, cohort, broadcasts)
        while True:
            with watch.stage("train"):
                outcome = next(trained, None)
            if outcome is None:
                break
            yield outcome
        for client_id in sorted(by_id.keys() - {client.client_id for client in clients}):
            yield ClientFailure(client_id, "train", "the engine gave no outcome for this client")

    def survivors() -> Iterator[Update]:
        for outcome in outcomes():
            client = by_id.get(str(outcome.client_id))
            if client is None or any(client.client_id == known.client_id for known in clients):
                log.warning("round %d: dropped an outcome of %r, who is not due", server_round, outcome.client_id)
                continue
            if isinstance(outcome, Update):
                outcome = _validated(outcome, ranks[client.plan], loop.federation)
            clients.append(_client_record(client, ranks[client.plan], shapes, outcome))
            loop.notify(RoundEvent("client", server_round, len(cohort), client=clients[-1]))
            if isinstance(outcome, Update):
                yield outcome

    updates = survivors()
    first = next(updates, None)
    if first is None:
        return state, clients, "no client survived; the state was kept"
    before, problem = watch.seconds["train"], None
    rng = torch.Generator().manual_seed(stream_seed(loop.settings.seed, "uplink", server_round))
    try:
        with watch.stage("aggregate"):
            state = loop.aggregator.aggregate(state, receive(loop.uplink, chain([first], updates), rng))
    except FlexLoraError as error:
        problem = f"the updates could not be aggregated and the state was kept: {error}"
    # The aggregator waits for clients while it folds; that time is theirs.
    watch.seconds["aggregate"] -= watch.seconds["train"] - before
    for _ in updates:
        pass  # Clients that nobody asked for any more belong into the record too.
    return state, clients, problem


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
