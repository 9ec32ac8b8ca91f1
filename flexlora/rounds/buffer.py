"""Runs buffered asynchronous rounds on the virtual clock: clients come and go, and the server steps after K updates.

Up to C clients are at work at any time. When one comes back, another takes its place, at once or as soon as one is
available, and starts from the newest model. After K updates the server adds their changes and has a new model (FedBuff,
arXiv:2106.06639). The staleness of an update is the number of server steps since its client started.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import ClientFailure
from flexlora.federation.streams import stream
from flexlora.rounds.clock import Clock, ClockState, Sizes, Trip, available_from, failure, start_trip

# After this many failures per update wanted a round ends with the updates it has, or it might never end.
MOST_FAILURES_PER_UPDATE = 10


@dataclass(frozen=True)
class FilledBuffer:
    """The trips that ended before the server stepped.

    Attributes:
        state: The clock afterwards.
        arrived: The trips whose updates count, in order of arrival.
        lost: The failures of the other clients, in order of their ends.
        gone: The trips of those clients.
    """

    state: ClockState
    arrived: tuple[Trip, ...]
    lost: tuple[ClientFailure, ...]
    gone: tuple[Trip, ...]


def fill_buffer(
    clock: Clock, clients: Sequence[ClientSpec], concurrency: int, server_round: int, state: ClockState, sizes: Sizes
) -> FilledBuffer:
    """Return the trips that end until ``buffer_size`` updates have arrived.

    A client starts at most once per server step, so no two updates of a step come from one client and the same model.

    Args:
        clock: With the policy ``async``.
        clients: Everybody who can be sampled.
        concurrency: Most clients at work at once.
        server_round: The round being filled; clients that start during it train from its broadcast.
        state: The clock before the round.
        sizes: Sizes of this round's broadcasts and their updates.
    """
    policy, now, num_sent, trips = clock.policy, state.now, state.num_sent, list(state.trips)
    arrived: list[Trip] = []
    lost: list[ClientFailure] = []
    gone: list[Trip] = []
    done: set[str] = set()
    most_lost = MOST_FAILURES_PER_UPDATE * policy.buffer_size
    while len(arrived) < policy.buffer_size and len(lost) < most_lost:
        busy = done | {trip.client_id for trip in trips}
        while len(trips) < concurrency:
            client = _draw(clock, clients, busy, num_sent, now)
            if client is None:
                break
            trips.append(start_trip(clock, client, server_round, now, *sizes(client.plan)))
            busy.add(client.client_id)
            num_sent += 1
        trip = min(trips, key=lambda trip: (trip.ends, trip.client_id), default=None)
        if len(trips) < concurrency:
            free = (client for client in clients if client.client_id not in busy)
            following = min((available_from(clock, client, now) for client in free), default=math.inf)
            if following < (math.inf if trip is None else trip.ends):
                now = max(now, following)
                continue
        if trip is None:
            break  # Every client has had its turn in this round.
        trips.remove(trip)
        done.add(trip.client_id)
        now = max(now, trip.ends)
        staleness = server_round - trip.server_round
        if trip.breakdown is not None:
            gone.append(trip)
            lost.append(failure(trip))
        elif policy.max_staleness is not None and staleness > policy.max_staleness:
            reason = f"its model was {staleness} server steps old; clock.max_staleness is {policy.max_staleness}"
            gone.append(trip)
            lost.append(failure(trip, trip.seconds, reason, "stale"))
        else:
            arrived.append(trip)
    return FilledBuffer(ClockState(now, num_sent, tuple(trips)), tuple(arrived), tuple(lost), tuple(gone))


def still_needed(clock: Clock, state: ClockState, server_round: int) -> set[tuple[str, int]]:
    """Return client id and round of the trips whose updates may still count after ``server_round``."""
    most = clock.policy.max_staleness
    return {
        (trip.client_id, trip.server_round)
        for trip in state.trips
        if trip.breakdown is None and (most is None or server_round + 1 - trip.server_round <= most)
    }


def _draw(clock: Clock, clients: Sequence[ClientSpec], busy: set[str], num_sent: int, now: float) -> ClientSpec | None:
    """Return an available client that is not busy, drawn uniformly; None if there is none."""
    order = stream(clock.seed, "async", num_sent).permutation(len(clients))
    for index in order:
        client = clients[index]
        if client.client_id not in busy and available_from(clock, client, now) <= now:
            return client
    return None
