"""Turns what the clients of a round come back with into the next state: trained, checked, recorded, aggregated."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch

from flexlora.aggregators.base import AggregationError, ChangeAggregator
from flexlora.engines.base import Engine, RoundOrder
from flexlora.errors import FlexLoraError
from flexlora.federation.clients import ClientSpec, compact_ranks
from flexlora.federation.message_checks import UpdateError, check_update
from flexlora.federation.messages import Broadcast, Change, ClientFailure, KeptFactors, Update
from flexlora.federation.streams import stream_seed
from flexlora.lora.factors import AdapterState
from flexlora.lora.spectrum import share_inside
from flexlora.rounds.clock import Policy, Trip
from flexlora.rounds.cohort import Work
from flexlora.rounds.loop_parts import Federation, Loop, RoundEvent, Stopwatch
from flexlora.rounds.records import ClientRecord, RoundRecord, SecureSumRecord, SpectrumRecord, rounded
from flexlora.uplink.base import receive

log = logging.getLogger(__name__)


def trained(engine: Engine, orders: Iterable[RoundOrder], watch: Stopwatch) -> Iterator[Update | ClientFailure]:
    """Yield the outcomes of all orders; the time spent waiting for them counts as ``train``."""
    for order in orders:
        outcomes = engine.train(order)
        while True:
            with watch.stage("train"):
                outcome = next(outcomes, None)
            if outcome is None:
                break
            yield outcome


def checked(
    loop: Loop,
    server_round: int,
    work: Work,
    outcomes: Iterable[Update | ClientFailure],
    records: list[ClientRecord],
    kept: dict[str, KeptFactors],
) -> Iterator[Update]:
    """Yield the updates that the server can use; append a record of every client, lost ones first, to ``records``.

    What clients keep goes into ``kept`` and no further.

    What a client sent is checked before any uplink step receives it: a step may fold the cohort into one update, in
    which nobody could tell a broken one. What the steps make of it is for the aggregator to check.
    """
    federation, due = loop.federation, dict(work.clients)
    order_of = _order_of(work)

    @cache
    def ranks_of(client: ClientSpec) -> dict[str, int]:
        """Return the ranks that a client was sent, those of its plan if it was sent nothing."""
        order = order_of.get(client.client_id)
        if order is None:
            return client.plan.resolve(federation.shapes)
        return {module: own.rank for module, own in order.parcel_of(client).broadcast.trainable.items()}

    def record(client: ClientSpec, outcome: Update | ClientFailure) -> None:
        """Append a client's record and tell the display."""
        trip = work.trips.get(client.client_id)
        known = _known(client, ranks_of(client), federation.shapes, trip, server_round)
        records.append(_client_record(known, outcome))
        loop.notify(RoundEvent("client", server_round, len(work.clients), client=records[-1]))

    for outcome in chain(work.lost, outcomes):
        client = due.pop(str(outcome.client_id), None)
        if client is None:
            log.warning("round %d: dropped an outcome of %r, who is not due", server_round, outcome.client_id)
            continue
        if isinstance(outcome, Update) and not outcome.is_held:
            outcome = _validated(outcome, order_of[client.client_id].parcel_of(client).arrived, federation)
        record(client, outcome)
        if isinstance(outcome, Update):
            if outcome.kept is not None:
                kept[client.client_id] = outcome.kept
            yield dataclasses.replace(outcome, kept=None, packet=None)
    for client_id, client in sorted(due.items()):
        record(client, ClientFailure(client_id, "train", "the engine gave no outcome for this client"))


def aggregated(
    loop: Loop, server_round: int, work: Work, state: Any, updates: Iterator[Update], watch: Stopwatch
) -> tuple[Any, str | None]:
    """Return the state after the updates, aggregated as they arrive, and what went wrong, if anything.

    ``updates`` is used up in any case: clients that no step asks for belong into the records too.
    """
    first = next(updates, None)
    if first is None:
        return state, "no client survived; the state was kept"
    train_seconds, problem, least = watch.seconds["train"], None, loop.settings.min_updates
    before, num_used = state, 0

    def counted() -> Iterator[Update]:
        nonlocal num_used
        for update in chain([first], updates):
            num_used += 1
            yield update

    rng = torch.Generator().manual_seed(stream_seed(loop.settings.seed, "uplink", server_round))
    try:
        with watch.stage("aggregate"):
            received = receive(loop.uplink, counted(), rng)
            if work.adds_changes:
                state = _add_changes(loop, server_round, work, state, received)
            else:
                state = loop.aggregator.aggregate(state, received)
    except FlexLoraError as error:
        problem = f"the updates could not be aggregated and the state was kept: {error}"
    # The aggregator waits for clients while it folds; that time is theirs.
    watch.seconds["aggregate"] -= watch.seconds["train"] - train_seconds
    for _ in updates:
        num_used += 1
    if problem is None and num_used < least:
        state = before
        problem = f"{num_used} clients survived, of rounds.min_updates={least} at least; the state was kept"
    return state, problem


def _add_changes(loop: Loop, server_round: int, work: Work, state: Any, updates: Iterable[Update]) -> Any:
    """Return the state with what the updates changed against what their clients were sent, however long ago."""
    assert loop.clock is not None and isinstance(loop.aggregator, ChangeAggregator), "the configuration is checked"
    return loop.aggregator.add_changes(state, _changes(loop.clock.policy, server_round, work, updates))


def _changes(policy: Policy, server_round: int, work: Work, updates: Iterable[Update]) -> Iterator[Change]:
    """Yield the updates as changes.

    Raises:
        AggregationError: If an update is not that of one client, or of cores.
    """
    order_of = _order_of(work)
    for update, start in starts_of(work, updates, "clock.policy=async"):
        if update.cores is not None:
            raise AggregationError("clock.policy=async adds up changes of factors, but clients train cores here")
        yield Change(update, start, policy.discount(server_round - order_of[str(update.client_id)].server_round))


def starts_of(work: Work, updates: Iterable[Update], needed_by: str) -> Iterator[tuple[Update, AdapterState]]:
    """Yield each update with what its client was sent, as it arrived there.

    Args:
        work: Of the round.
        updates: Of its clients.
        needed_by: The setting for which it has to be known.

    Raises:
        AggregationError: If an update is not that of one client.
    """
    order_of = _order_of(work)
    for update in updates:
        client_id = str(update.client_id)
        if client_id not in order_of:
            raise AggregationError(
                f"{needed_by} must know whose an update is, but an uplink step folded several into one; leave the "
                "step out"
            )
        yield update, order_of[client_id].parcel_of(work.clients[client_id]).arrived.trainable


def _order_of(work: Work) -> dict[str, RoundOrder]:
    """Return client id -> the order under which it trains; those who never reach the server have none."""
    return {client.client_id: order for order in work.orders for client in order.cohort}


def _validated(update: Update, sent: Broadcast, federation: Federation) -> Update | ClientFailure:
    """Return the update, or a failure if the server cannot use it."""
    try:
        check_update(update, sent, federation.shapes, federation.wire_dtype)
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise UpdateError(f"weight must be positive and finite; got {update.weight}")
        for module, factor in sorted((update.kept or {}).items()):
            if not factor.isfinite().all():
                raise UpdateError(f"{module}: the {sent.kept or 'memory'} that the client keeps must be finite")
    except UpdateError as error:
        return ClientFailure(str(update.client_id), "validate", str(error), update.down_bytes, update.up_bytes)
    return update


def _known(
    client: ClientSpec,
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    trip: Trip | None,
    server_round: int,
) -> dict[str, Any]:
    """Return what a client's record says however the client fares."""
    known: dict[str, Any] = {
        "client_id": client.client_id,
        "plan": client.plan.name,
        "ranks": compact_ranks(ranks, shapes),
        "num_examples": client.num_examples,
    }
    if trip is not None:
        staleness = server_round - trip.server_round
        known |= {"device": client.device, "virtual_seconds": rounded(trip.seconds), "staleness": staleness}
    return known


def _client_record(known: Mapping[str, Any], outcome: Update | ClientFailure) -> ClientRecord:
    travelled: dict[str, Any] = {"down_bytes": outcome.down_bytes, "up_bytes": outcome.up_bytes}
    if isinstance(outcome, ClientFailure):
        return ClientRecord(**known, **travelled, outcome="failed", stage=outcome.stage, reason=outcome.reason)
    steps = outcome.metrics.get("steps")
    return ClientRecord(
        **known,
        **travelled,
        outcome="ok",
        loss=rounded(outcome.metrics["loss"]) if "loss" in outcome.metrics else None,
        steps=None if steps is None else int(steps),
    )


def round_record(
    loop: Loop,
    server_round: int,
    state: Any,
    clients: Sequence[ClientRecord],
    problem: str | None,
    watch: Stopwatch,
    parts: Mapping[str, Any],
) -> RoundRecord:
    """Return what a round that has not been scored did; when and why the loop stopped is for the loop to add.

    ``parts`` are further fields of the record, by name.
    """
    secure_sum: SecureSumRecord | None = parts.get("secure_sum")
    with watch.stage("spectra"):
        spectra = loop.aggregator.spectra(state)
        plans = sorted({client.plan for client in loop.federation.clients}, key=lambda plan: plan.name)
        kept = {plan.name: share_inside(spectra, plan.resolve(loop.federation.shapes)) for plan in plans}
    return RoundRecord(
        server_round=server_round,
        learning_rate=loop.learning_rate(server_round),
        clients=list(clients),
        up_bytes=sum(client.up_bytes for client in clients),
        down_bytes=sum(client.down_bytes for client in clients),
        num_ok=sum(client.outcome == "ok" for client in clients),
        num_failed=sum(client.outcome == "failed" for client in clients),
        train_loss=_mean_loss(clients) if secure_sum is None else secure_sum.train_loss,
        spectra={
            module: SpectrumRecord(
                singular_values=[rounded(value) for value in spectrum.S.tolist()], tail=rounded(spectrum.tail)
            )
            for module, spectrum in spectra.items()
        },
        energy_kept={name: rounded(share) for name, share in kept.items()},
        energy_above_smallest=rounded(1.0 - min(kept.values())),
        note=problem,
        **parts,
    )


def _mean_loss(clients: Sequence[ClientRecord]) -> float | None:
    """Return the mean training loss of the clients that have one, weighted by their examples."""
    scored = [(client.num_examples, client.loss) for client in clients if client.loss is not None]
    total = sum(num_examples for num_examples, _ in scored)
    return rounded(sum(num_examples * loss for num_examples, loss in scored) / total) if total else None
