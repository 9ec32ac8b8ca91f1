"""Decides who trains in a round, from what, and who never reaches the server."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexlora.aggregators.base import broadcasts_to_each, checked_broadcast
from flexlora.engines.base import Parcel, ParcelKey, RoundOrder
from flexlora.federation.clients import ClientSpec, RankPlan, sample_cohort, sample_poisson
from flexlora.federation.messages import Broadcast, ClientFailure
from flexlora.rounds.buffer import FilledBuffer, fill_buffer, still_needed
from flexlora.rounds.clock import Clock, ClockState, Trip, close_round, open_round, start_trip
from flexlora.rounds.loop_parts import Loop, Progress, Stopwatch
from flexlora.uplink.compression import compressed_size
from flexlora.uplink.wire import update_size


@dataclass(frozen=True)
class Work:
    """What a round has to do.

    Attributes:
        clients: Client id -> everybody the round is about, whether it trains or not.
        orders: Who trains, from what; one per round whose broadcasts clients start from.
        progress: As it is when they are back.
        lost: Who was sampled and never reaches the server.
        trips: Client id -> its trip on the virtual clock, if there is one.
        adds_changes: Whether updates count by what they changed, discounted by their staleness.
    """

    clients: Mapping[str, ClientSpec]
    orders: Sequence[RoundOrder]
    progress: Progress
    lost: Sequence[ClientFailure] = ()
    trips: Mapping[str, Trip] = field(default_factory=dict)
    adds_changes: bool = False


def cohort_work(loop: Loop, server_round: int, state: Any, progress: Progress, watch: Stopwatch) -> Work:
    """Return who trains in a round, from what, and who never reaches the server."""
    if loop.clock is None:
        return _sampled_work(loop, server_round, state, progress, watch)
    if loop.clock.policy.name == "async":
        return _buffered_work(loop, loop.clock, server_round, state, progress, watch)
    return _timed_work(loop, loop.clock, server_round, state, progress, watch)


def _sampled_work(loop: Loop, server_round: int, state: Any, progress: Progress, watch: Stopwatch) -> Work:
    """Return the work of a round without devices: the whole sample trains."""
    settings = loop.settings
    sample = sample_poisson if settings.sampling == "poisson" else sample_cohort
    seed = settings.seed if settings.cohort_seed is None else settings.cohort_seed
    cohort = sample(loop.federation.clients, settings.cohort_size, seed, server_round)
    parcels = _parcels(loop, state, cohort, watch)
    return Work(_by_id(cohort), [_order(loop, server_round, cohort, parcels, progress)] if cohort else [], progress)


def _timed_work(loop: Loop, clock: Clock, server_round: int, state: Any, progress: Progress, watch: Stopwatch) -> Work:
    """Return the work of a round on the virtual clock: only those whose updates will count train."""
    cohort_size = loop.settings.cohort_size
    begins, cohort = open_round(clock, loop.federation.clients, cohort_size, server_round, progress.clock.now)
    parcels = _parcels(loop, state, cohort, watch)
    order = _order(loop, server_round, cohort, parcels, progress)
    sizes = {key: _sizes(loop, parcel) for key, parcel in parcels.items()}
    trips = [start_trip(clock, client, server_round, begins, *sizes[order.key_of(client)]) for client in cohort]
    closed = close_round(clock.policy, trips, cohort_size, begins)
    arrived = set(closed.arrived)
    in_time = [client for client in cohort if client.client_id in arrived]
    return Work(
        clients=_by_id(cohort),
        orders=[dataclasses.replace(order, cohort=in_time)],
        progress=dataclasses.replace(progress, clock=ClockState(closed.ends)),
        lost=closed.lost,
        trips={trip.client_id: trip for trip in trips},
    )


def _buffered_work(
    loop: Loop, clock: Clock, server_round: int, state: Any, progress: Progress, watch: Stopwatch
) -> Work:
    """Return the work of a round that waits for no cohort: clients come back with what they were sent rounds ago."""
    clients, wire_dtype = loop.federation.clients, loop.federation.wire_dtype
    fresh: dict[RankPlan, Parcel] = {}

    def sizes_of(plan: RankPlan) -> tuple[int, int]:
        """Make a plan's broadcast when its first client starts."""
        if plan not in fresh:
            fresh[plan] = _parcel(loop, state, plan, None, watch)
        return _sizes(loop, fresh[plan])

    filled = fill_buffer(clock, clients, loop.settings.cohort_size, server_round, progress.clock, sizes_of)
    trips = {trip.client_id: trip for trip in (*filled.arrived, *filled.gone)}
    parcels = {name: Parcel(broadcast, wire_dtype) for name, broadcast in progress.sent.items()}
    parcels |= {_sent_name(server_round, plan): parcel for plan, parcel in fresh.items()}
    # As it arrives: a change is against that, and a checkpoint gives back the same strides, without which a resumed run
    # would round differently.
    sent = {**progress.sent, **{_sent_name(server_round, plan): parcel.arrived for plan, parcel in fresh.items()}}
    return Work(
        clients=_by_id(client for client in clients if client.client_id in trips),
        orders=_buffered_orders(loop, filled, parcels, progress),
        progress=dataclasses.replace(
            progress, clock=filled.state, sent=_still_needed(loop, clock, filled, server_round, sent)
        ),
        lost=filled.lost,
        trips=trips,
        adds_changes=True,
    )


def _buffered_orders(
    loop: Loop, filled: FilledBuffer, parcels: Mapping[str, Parcel], progress: Progress
) -> list[RoundOrder]:
    """Return one order per round in which clients that came back were sent off, oldest first.

    Args:
        parcels: What clients were sent, by ``_sent_name``.
    """
    clients = _by_id(loop.federation.clients)
    orders = []
    for number in sorted({trip.server_round for trip in filled.arrived}):
        ids = sorted(trip.client_id for trip in filled.arrived if trip.server_round == number)
        cohort = [clients[client_id] for client_id in ids]
        plans = {client.plan for client in cohort}
        own: dict[ParcelKey, Parcel] = {plan: parcels[_sent_name(number, plan)] for plan in plans}
        orders.append(_order(loop, number, cohort, own, progress))
    return orders


def _still_needed(
    loop: Loop, clock: Clock, filled: FilledBuffer, server_round: int, sent: Mapping[str, Broadcast]
) -> dict[str, Broadcast]:
    """Return what of ``sent`` a client still at work may yet come back with."""
    clients = _by_id(loop.federation.clients)
    needed = {
        _sent_name(number, clients[client_id].plan)
        for client_id, number in still_needed(clock, filled.state, server_round)
    }
    return {name: broadcast for name, broadcast in sent.items() if name in needed}


def _sent_name(server_round: int, plan: RankPlan) -> str:
    return f"{server_round}/{plan.name}"


def _by_id(clients: Iterable[ClientSpec]) -> dict[str, ClientSpec]:
    return {client.client_id: client for client in clients}


def _order(
    loop: Loop,
    server_round: int,
    cohort: Sequence[ClientSpec],
    parcels: Mapping[ParcelKey, Parcel],
    progress: Progress,
) -> RoundOrder:
    """Return the order to train a cohort from the broadcasts of ``server_round``."""
    return RoundOrder(
        server_round=server_round,
        seed=loop.settings.seed,
        learning_rate=loop.learning_rate(server_round),
        wire_dtype=loop.federation.wire_dtype,
        uplink=loop.uplink,
        cohort=cohort,
        parcels=parcels,
        kept=progress.kept,
        compression=loop.federation.compression,
        phases=None if loop.secure_sum is None else loop.secure_sum.phases,
    )


def _parcels(loop: Loop, state: Any, cohort: Sequence[ClientSpec], watch: Stopwatch) -> dict[ParcelKey, Parcel]:
    """Return what a cohort is sent: a parcel for each rank plan, or for each client if the method makes its own."""
    if broadcasts_to_each(loop.aggregator):
        return {client.client_id: _parcel(loop, state, client.plan, client.client_id, watch) for client in cohort}
    return {plan: _parcel(loop, state, plan, None, watch) for plan in dict.fromkeys(client.plan for client in cohort)}


def _parcel(loop: Loop, state: Any, plan: RankPlan, client_id: str | None, watch: Stopwatch) -> Parcel:
    with watch.stage("broadcast"):
        broadcast = checked_broadcast(loop.aggregator, state, plan.resolve(loop.federation.shapes), client_id)
    return Parcel(broadcast, loop.federation.wire_dtype)


def _sizes(loop: Loop, parcel: Parcel) -> tuple[int, int]:
    """Return the bytes of a broadcast and of the update that it will come back as."""
    how, sent = loop.federation.compression, parcel.broadcast
    return len(parcel.packet), update_size(None, sent, parcel.wire_dtype) if how is None else compressed_size(sent, how)
