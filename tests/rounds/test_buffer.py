"""Asynchronous rounds by hand: who is sent what, who comes back when, and how stale."""

import dataclasses

import pytest

from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.rounds.buffer import fill_buffer, still_needed
from flexlora.rounds.clock import Clock, ClockState, Policy
from flexlora.rounds.costs import ClientCost
from flexlora.rounds.devices import DeviceProfile

PLAN = RankPlan("p", (("", 1),))
# Training takes 1, 3 and 10 seconds; transfers of 0 bytes take none.
SECONDS = {"fast": 1.0, "middling": 3.0, "slow": 10.0}
CLIENTS = [ClientSpec(name, PLAN, 1, device=name) for name in SECONDS]


def clock_of(policy: Policy, **changes: object) -> Clock:
    profiles = {
        name: dataclasses.replace(DeviceProfile(name, 1000.0, 1.0, 1.0, 1.0), **changes)  # type: ignore[arg-type]
        for name in SECONDS
    }
    return Clock(profiles, lambda client: ClientCost(1, 10, 0, 0, SECONDS[client.device]), policy, 0)


def no_bytes(plan: RankPlan) -> tuple[int, int]:
    return 0, 0


def async_policy(**options: object) -> Policy:
    return Policy("async", **options)  # type: ignore[arg-type]


def test_a_server_that_does_not_wait_steps_whenever_its_buffer_is_full() -> None:
    clock, state = clock_of(async_policy(buffer_size=1)), ClockState()
    seen = []
    for server_round in range(1, 13):
        filled = fill_buffer(clock, CLIENTS, 3, server_round, state, no_bytes)
        state = filled.state
        seen += [(t.client_id, filled.state.now, server_round - t.server_round) for t in filled.arrived]
    # Whoever is done is sent off again in the round after: the others are at work already. At second 3 two are done,
    # and names decide; at second 10 fast and slow are.
    assert seen == [
        ("fast", 1.0, 0),
        ("fast", 2.0, 0),
        ("fast", 3.0, 0),
        ("middling", 3.0, 3),
        ("fast", 4.0, 1),
        ("fast", 5.0, 0),
        ("fast", 6.0, 0),
        ("middling", 6.0, 3),
        ("fast", 7.0, 1),
        ("fast", 8.0, 0),
        ("fast", 9.0, 0),
        ("middling", 9.0, 3),
    ]
    assert fill_buffer(clock, CLIENTS, 3, 13, state, no_bytes).arrived[0].client_id == "fast"
    assert state.num_sent == 3 + 12 - 1  # The last one back is replaced when the next round begins.


def test_nobody_is_sent_off_twice_for_one_server_step() -> None:
    clock = clock_of(async_policy(buffer_size=3))
    filled = fill_buffer(clock, CLIENTS, 3, 1, ClockState(), no_bytes)
    assert [trip.client_id for trip in filled.arrived] == ["fast", "middling", "slow"]
    assert (filled.state.now, filled.state.trips) == (10.0, ())
    # More than there are clients can never come: the round ends with those who did.
    many = fill_buffer(clock_of(async_policy(buffer_size=5)), CLIENTS, 3, 1, ClockState(), no_bytes)
    assert len(many.arrived) == 3


def test_at_most_so_many_clients_are_at_work() -> None:
    clock = clock_of(async_policy(buffer_size=1))
    filled = fill_buffer(clock, CLIENTS, 1, 1, ClockState(), no_bytes)
    assert len(filled.arrived) == 1 and filled.state.trips == () and filled.state.num_sent == 1


def test_updates_that_are_too_stale_are_dropped_and_what_they_were_sent_is_let_go() -> None:
    clock, state = clock_of(async_policy(buffer_size=1, max_staleness=2)), ClockState()
    lost = []
    for server_round in range(1, 6):
        filled = fill_buffer(clock, CLIENTS, 3, server_round, state, no_bytes)
        state = filled.state
        lost += [(one.client_id, one.stage, one.reason) for one in filled.lost]
        needed = {name for name, _ in still_needed(clock, state, server_round)}
        # Sent off in round 1, slow may be used up to round 3: after that its broadcast is no longer kept.
        assert ("slow" in needed) == (server_round < 3)
        assert ("slow", 1) in {(trip.client_id, trip.server_round) for trip in state.trips}
    assert lost == [("middling", "stale", "its model was 3 server steps old; clock.max_staleness is 2")]


def test_a_round_in_which_everybody_fails_ends() -> None:
    clock = clock_of(async_policy(buffer_size=2), memory_bytes=1.0)
    filled = fill_buffer(clock, CLIENTS, 2, 1, ClockState(), no_bytes)
    assert filled.arrived == () and {one.client_id for one in filled.lost} == set(SECONDS)
    assert all("out of memory" in one.reason for one in filled.lost)


def test_time_passes_where_nobody_is_there() -> None:
    clock = clock_of(async_policy(buffer_size=1, day_seconds=24.0), availability=0.25, hours=(6.0, 12.0))
    filled = fill_buffer(clock, CLIENTS, 3, 1, ClockState(), no_bytes)
    assert filled.state.now == pytest.approx(7.0) and filled.arrived[0].client_id == "fast"


def test_filling_is_a_function_of_the_seed_and_the_state() -> None:
    clients = [ClientSpec(f"c{n}", PLAN, 1, device=list(SECONDS)[n % 3]) for n in range(30)]
    clock = clock_of(async_policy(buffer_size=4, jitter=0.5), dropout=0.2)
    whole, states = ClockState(), []
    for server_round in range(1, 8):
        states.append(whole)
        whole = fill_buffer(clock, clients, 8, server_round, whole, no_bytes).state
    again = states[4]
    for server_round in range(5, 8):
        again = fill_buffer(clock, clients, 8, server_round, again, no_bytes).state
    assert again == whole
    other = dataclasses.replace(clock, seed=1)
    assert fill_buffer(other, clients, 8, 1, ClockState(), no_bytes) != fill_buffer(
        clock, clients, 8, 1, ClockState(), no_bytes
    )


def test_an_empty_place_is_taken_by_whoever_becomes_available_first() -> None:
    # A day of 24 seconds: the fast are there from 2 to 3 o'clock, while the slow one, there all day, is at work.
    clock = clock_of(async_policy(buffer_size=2, day_seconds=24.0))
    hours = {"availability": 1 / 24, "hours": (2.0, 3.0)}
    profiles = {**clock.profiles, "fast": dataclasses.replace(clock.profiles["fast"], **hours)}
    clients = [ClientSpec("late", PLAN, 1, device="fast"), ClientSpec("slow", PLAN, 1, device="slow")]
    filled = fill_buffer(dataclasses.replace(clock, profiles=profiles), clients, 3, 1, ClockState(), no_bytes)
    assert [(trip.client_id, trip.starts, trip.ends) for trip in filled.arrived] == [
        ("late", 2.0, 3.0),
        ("slow", 0.0, 10.0),
    ]
