"""Who trains in a round, from what, and who is lost on the way."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexlora.federation.clients import ClientSpec, RankPlan, sample_cohort
from flexlora.federation.messages import Broadcast, ClientFailure
from flexlora.rounds.buffer import fill_buffer, still_needed
from flexlora.rounds.clock import Clock, ClockState, Trip, close_round, open_round, start_trip
from flexlora.rounds.loop_parts import Loop, Progress, Stopwatch
from flexlora.uplink.wire import WireDtype, decode_broadcast, encode, encode_broadcast


@dataclass(frozen=True)
class Batch:
    """Clients that start from the broadcasts of one round."""

    server_round: int
    cohort: Sequence[ClientSpec]
    broadcasts: Mapping[RankPlan, Broadcast]


@dataclass(frozen=True)
class Work:
    """What a round has to do.

    Attributes:
        batches: Who trains, from what.
        lost: Who was sampled and does not get to the server.
        progress: As it is once they are back.
        trips: Client id -> its way on the virtual clock, if there is one.
        adds_changes: Updates count by what they changed, discounted by their staleness.
    """

    batches: Sequence[Batch]
    progress: Progress
    lost: Sequence[ClientFailure] = ()
    trips: Mapping[str, Trip] = field(default_factory=dict)
    adds_changes: bool = False

    @property
    def num_clients(self) -> int:
        return len(self.lost) + sum(len(batch.cohort) for batch in self.batches)


def cohort_work(loop: Loop, server_round: int, state: Any, progress: Progress, watch: Stopwatch) -> Work:
    """Return who trains in a round, from what, and who is lost on the way."""
    settings, clients, clock = loop.settings, loop.federation.clients, loop.clock
    if clock is None:
        cohort = sample_cohort(clients, settings.cohort_size, settings.seed, server_round)
        return Work([Batch(server_round, cohort, broadcasts_of(loop, state, cohort, watch))], progress)
    if clock.policy.name == "async":
        return _buffered_work(loop, clock, server_round, state, progress, watch)
    begins, cohort = open_round(clock, clients, settings.cohort_size, server_round, progress.clock.now)
    broadcasts = broadcasts_of(loop, state, cohort, watch)
    sizes = {plan: _sizes(broadcast, loop.federation.wire_dtype) for plan, broadcast in broadcasts.items()}
    trips = [start_trip(clock, client, server_round, begins, *sizes[client.plan]) for client in cohort]
    closed = close_round(clock.policy, trips, settings.cohort_size, begins)
    arrived = set(closed.arrived)
    return Work(
        [Batch(server_round, [client for client in cohort if client.client_id in arrived], broadcasts)],
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
        batches.append(Batch(number, cohort, {plan: sent[_sent_name(number, plan)] for plan in plans}))
    needed = {
        _sent_name(number, by_id[client_id].plan)
        for client_id, number in still_needed(clock, filled.state, server_round)
    }
    kept = {name: broadcast for name, broadcast in sent.items() if name in needed}
    trips = {trip.client_id: trip for trip in (*filled.arrived, *filled.gone)}
    return Work(
        batches, dataclasses.replace(progress, clock=filled.state, sent=kept), filled.lost, trips, adds_changes=True
    )


def _sent_name(server_round: int, plan: RankPlan) -> str:
    return f"{server_round}/{plan.name}"


def broadcasts_of(loop: Loop, state: Any, cohort: Sequence[ClientSpec], watch: Stopwatch) -> dict[RankPlan, Broadcast]:
    """Return what each rank plan of a cohort is sent."""
    with watch.stage("broadcast"):
        plans = dict.fromkeys(client.plan for client in cohort)
        return {plan: loop.aggregator.broadcast(state, plan.resolve(loop.federation.shapes)) for plan in plans}


def _sizes(broadcast: Broadcast, wire_dtype: WireDtype) -> tuple[int, int]:
    """Return the bytes of a broadcast and of the update that it will come back as."""
    return len(encode_broadcast(broadcast, wire_dtype)), len(encode(broadcast.trainable, wire_dtype))
