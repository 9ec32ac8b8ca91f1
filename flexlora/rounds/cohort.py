"""Who trains in a round, from what, and who is lost on the way."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexlora.engines.base import Parcel, RoundOrder
from flexlora.federation.clients import ClientSpec, RankPlan, sample_cohort
from flexlora.federation.messages import ClientFailure
from flexlora.rounds.buffer import fill_buffer, still_needed
from flexlora.rounds.clock import Clock, ClockState, Trip, close_round, open_round, start_trip
from flexlora.rounds.loop_parts import Loop, Progress, Stopwatch
from flexlora.uplink.wire import encoded_size


@dataclass(frozen=True)
class Work:
    """What a round has to do.

    Attributes:
        orders: Who trains, from what; one per round whose broadcasts clients start from.
        lost: Who was sampled and does not get to the server.
        progress: As it is once they are back.
        trips: Client id -> its way on the virtual clock, if there is one.
        adds_changes: Updates count by what they changed, discounted by their staleness.
    """

    orders: Sequence[RoundOrder]
    progress: Progress
    lost: Sequence[ClientFailure] = ()
    trips: Mapping[str, Trip] = field(default_factory=dict)
    adds_changes: bool = False

    @property
    def num_clients(self) -> int:
        return len(self.lost) + sum(len(order.cohort) for order in self.orders)


def cohort_work(loop: Loop, server_round: int, state: Any, progress: Progress, watch: Stopwatch) -> Work:
    """Return who trains in a round, from what, and who is lost on the way."""
    settings, clients, clock = loop.settings, loop.federation.clients, loop.clock
    if clock is None:
        cohort = sample_cohort(clients, settings.cohort_size, settings.seed, server_round)
        return Work([order_of(loop, server_round, cohort, parcels_of(loop, state, cohort, watch))], progress)
    if clock.policy.name == "async":
        return _buffered_work(loop, clock, server_round, state, progress, watch)
    begins, cohort = open_round(clock, clients, settings.cohort_size, server_round, progress.clock.now)
    parcels = parcels_of(loop, state, cohort, watch)
    sizes = {plan: _sizes(parcel) for plan, parcel in parcels.items()}
    trips = [start_trip(clock, client, server_round, begins, *sizes[client.plan]) for client in cohort]
    closed = close_round(clock.policy, trips, settings.cohort_size, begins)
    arrived = set(closed.arrived)
    return Work(
        [order_of(loop, server_round, [client for client in cohort if client.client_id in arrived], parcels)],
        dataclasses.replace(progress, clock=ClockState(closed.ends)),
        closed.lost,
        {trip.client_id: trip for trip in trips},
    )


def _buffered_work(
    loop: Loop, clock: Clock, server_round: int, state: Any, progress: Progress, watch: Stopwatch
) -> Work:
    """Return the same for a server that does not wait: clients come back with what they were sent rounds ago."""
    federation = loop.federation
    by_id = {client.client_id: client for client in federation.clients}
    fresh: dict[RankPlan, Parcel] = {}

    def sizes_of(plan: RankPlan) -> tuple[int, int]:
        with watch.stage("broadcast"):
            if plan not in fresh:
                broadcast = loop.aggregator.broadcast(state, plan.resolve(federation.shapes))
                fresh[plan] = Parcel(broadcast, federation.wire_dtype)
            return _sizes(fresh[plan])

    concurrency, before = loop.settings.cohort_size, progress.clock
    filled = fill_buffer(clock, federation.clients, concurrency, server_round, before, sizes_of)
    parcels = {name: Parcel(broadcast, federation.wire_dtype) for name, broadcast in progress.sent.items()}
    parcels |= {_sent_name(server_round, plan): parcel for plan, parcel in fresh.items()}
    orders = []
    for number in sorted({trip.server_round for trip in filled.arrived}):
        ids = sorted(trip.client_id for trip in filled.arrived if trip.server_round == number)
        cohort = [by_id[client_id] for client_id in ids]
        plans = {client.plan for client in cohort}
        orders.append(order_of(loop, number, cohort, {plan: parcels[_sent_name(number, plan)] for plan in plans}))
    needed = {
        _sent_name(number, by_id[client_id].plan)
        for client_id, number in still_needed(clock, filled.state, server_round)
    }
    # As it arrives: a change is against that, and a checkpoint gives back the same strides, without which a resumed run
    # would round differently.
    arrived = {_sent_name(server_round, plan): parcel.arrived for plan, parcel in fresh.items()}
    kept = {name: broadcast for name, broadcast in {**progress.sent, **arrived}.items() if name in needed}
    trips = {trip.client_id: trip for trip in (*filled.arrived, *filled.gone)}
    return Work(
        orders, dataclasses.replace(progress, clock=filled.state, sent=kept), filled.lost, trips, adds_changes=True
    )


def _sent_name(server_round: int, plan: RankPlan) -> str:
    return f"{server_round}/{plan.name}"


def order_of(
    loop: Loop, server_round: int, cohort: Sequence[ClientSpec], parcels: Mapping[RankPlan, Parcel]
) -> RoundOrder:
    """Return the order to train a cohort that starts from the broadcasts of ``server_round``."""
    return RoundOrder(
        server_round=server_round,
        seed=loop.settings.seed,
        learning_rate=loop.learning_rate(server_round),
        wire_dtype=loop.federation.wire_dtype,
        uplink=loop.uplink,
        cohort=cohort,
        parcels=parcels,
    )


def parcels_of(loop: Loop, state: Any, cohort: Sequence[ClientSpec], watch: Stopwatch) -> dict[RankPlan, Parcel]:
    """Return what each rank plan of a cohort is sent."""
    shapes, wire_dtype = loop.federation.shapes, loop.federation.wire_dtype
    with watch.stage("broadcast"):
        plans = dict.fromkeys(client.plan for client in cohort)
        return {plan: Parcel(loop.aggregator.broadcast(state, plan.resolve(shapes)), wire_dtype) for plan in plans}


def _sizes(parcel: Parcel) -> tuple[int, int]:
    """Return the bytes of a broadcast and of the update that it will come back as."""
    return len(parcel.packet), encoded_size(parcel.broadcast.trainable, parcel.wire_dtype)
