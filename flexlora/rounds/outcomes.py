"""Trains a cohort and folds its updates: each outcome is checked, recorded and handed to the aggregator."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from flexlora.aggregators.base import AggregationError, ChangeAggregator
from flexlora.engines.base import RoundOrder
from flexlora.errors import FlexLoraError
from flexlora.federation.clients import ClientSpec, compact_ranks
from flexlora.federation.messages import Change, ClientFailure, Update
from flexlora.federation.streams import stream_seed
from flexlora.rounds.clock import Trip
from flexlora.rounds.cohort import Work
from flexlora.rounds.loop_parts import Federation, Loop, RoundEvent, Stopwatch
from flexlora.rounds.records import ClientRecord, rounded
from flexlora.uplink.base import receive
from flexlora.uplink.wire import UpdateError, check_update

log = logging.getLogger(__name__)


def train_cohort(
    loop: Loop, server_round: int, state: Any, work: Work, watch: Stopwatch
) -> tuple[Any, list[ClientRecord], str | None]:
    """Return the state after the updates, folded as they arrive, each client's outcome, and what went wrong.

    What a client sent is checked before any uplink step receives it: a step may fold the cohort into one update, in
    which nobody could tell a broken one. What the steps make of it is for the aggregator to check.
    """
    shapes = loop.federation.shapes
    order_of = {client.client_id: order for order in work.orders for client in order.cohort}
    due = order_of.keys() | {outcome.client_id for outcome in work.lost}
    by_id = {client.client_id: client for client in loop.federation.clients if client.client_id in due}
    ranks = {plan: plan.resolve(shapes) for plan in {client.plan for client in by_id.values()}}
    clients: list[ClientRecord] = []
    recorded: set[str] = set()

    def outcomes() -> Iterator[Update | ClientFailure]:
        for order in work.orders:
            trained = loop.engine.train(order)
            while True:
                with watch.stage("train"):
                    outcome = next(trained, None)
                if outcome is None:
                    break
                yield outcome
        for client_id in sorted(order_of.keys() - recorded):
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
                state = _add_changes(loop, server_round, state, received, by_id, order_of)
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
    order_of: Mapping[str, RoundOrder],
) -> Any:
    """Return the state with what the updates changed against what their clients were sent, however long ago.

    Raises:
        AggregationError: If an update is not that of one client.
    """
    assert loop.clock is not None and isinstance(loop.aggregator, ChangeAggregator), "the configuration is checked"
    policy = loop.clock.policy

    def changes() -> Iterator[Change]:
        for update in updates:
            order = order_of.get(str(update.client_id))
            if order is None:
                raise AggregationError(
                    "clock.policy=async must know whose an update is, but an uplink step folded several into one; "
                    "leave the step out or choose another clock.policy"
                )
            start = order.parcels[by_id[str(update.client_id)].plan].arrived.trainable
            yield Change(update, start, policy.discount(server_round - order.server_round))

    return loop.aggregator.add_changes(state, changes())


def _on_the_clock(client: ClientSpec, trip: Trip, server_round: int) -> dict[str, Any]:
    """Return what a client's record says about its device and its time."""
    seconds, staleness = rounded(trip.seconds), server_round - trip.server_round
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
        loss=rounded(outcome.metrics["loss"]) if "loss" in outcome.metrics else None,
        steps=None if steps is None else int(steps),
    )


def mean_loss(clients: Sequence[ClientRecord]) -> float | None:
    """Return the mean training loss of the clients that have one, weighted by their examples."""
    scored = [client for client in clients if client.loss is not None]
    total = sum(client.num_examples for client in scored)
    return rounded(sum(client.num_examples * client.loss for client in scored) / total) if total else None  # type: ignore[operator]
