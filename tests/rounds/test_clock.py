"""Virtual time by hand: trips, deadlines, over-selection, dropouts, availability."""

import math
from collections.abc import Mapping

import pytest

from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import ClientFailure
from flexlora.rounds.clock import (
    Breakdown,
    Clock,
    Policy,
    Trip,
    available_from,
    clients_per_round,
    close_round,
    failure,
    open_round,
    start_trip,
)
from flexlora.rounds.costs import ClientCost
from flexlora.rounds.devices import DeviceProfile

PLAN = RankPlan("p", (("", 1),))
BOX = DeviceProfile("box", 1000.0, 1.0, 100.0, 50.0, latency_seconds=0.5)


def clock_of(policy: Policy, *profiles: DeviceProfile, memory: int = 10, seconds: float = 4.0, seed: int = 0) -> Clock:
    cost = ClientCost(num_trainable=1, memory_bytes=memory, transfer_bytes=1, up_bytes=1, train_seconds=seconds)
    return Clock({profile.name: profile for profile in profiles or (BOX,)}, lambda client: cost, policy, seed)


def client(client_id: str = "a", device: str = "box") -> ClientSpec:
    return ClientSpec(client_id, PLAN, 1, device=device)


def trip(client_id: str, *seconds: float, breaks: float | None = None) -> Trip:
    download, compute, upload = seconds
    breakdown = None if breaks is None else Breakdown(breaks, "broke")
    return Trip(client_id, 1, 100.0, download, compute, upload, 1000, 200, breakdown)


# Arrive after 4, 9 and 20 seconds.
TRIPS = (trip("c", 1, 2, 1), trip("a", 2, 5, 2), trip("b", 4, 10, 6))


def test_a_trip_is_download_training_and_upload() -> None:
    # 300 bytes at 100 a second and 0.5 s; 4 s; 100 bytes at 50 a second and 0.5 s.
    found = start_trip(clock_of(Policy()), client(), 3, 7.0, 300, 100)
    assert (found.download_seconds, found.compute_seconds, found.upload_seconds) == (3.5, 4.0, 2.5)
    assert (found.starts, found.seconds, found.ends, found.server_round) == (7.0, 10.0, 17.0, 3)
    assert found.breakdown is None


def test_jitter_stretches_a_whole_trip_and_depends_on_seed_round_and_client() -> None:
    policy = Policy(jitter=0.3)
    found = start_trip(clock_of(policy), client(), 3, 0.0, 300, 100)
    factor = found.seconds / 10.0
    assert factor != 1
    assert (found.download_seconds, found.upload_seconds) == pytest.approx((3.5 * factor, 2.5 * factor))
    assert found == start_trip(clock_of(policy), client(), 3, 0.0, 300, 100)
    others = [
        start_trip(clock_of(policy), client("b"), 3, 0.0, 300, 100),
        start_trip(clock_of(policy), client(), 4, 0.0, 300, 100),
        start_trip(clock_of(policy, seed=1), client(), 3, 0.0, 300, 100),
    ]
    assert len({found.seconds, *(other.seconds for other in others)}) == 4
    factors = [start_trip(clock_of(policy, seed=seed), client(), 1, 0.0, 300, 100).seconds / 10 for seed in range(400)]
    logs = [math.log(value) for value in factors]
    assert sum(logs) / 400 == pytest.approx(0.0, abs=0.06)
    assert math.sqrt(sum(value**2 for value in logs) / 400) == pytest.approx(0.3, rel=0.15)


def test_a_device_without_the_memory_fails_when_training_begins() -> None:
    found = start_trip(clock_of(Policy(), memory=1500), client(), 1, 0.0, 300, 100)
    lost = failure(found)
    assert (lost.stage, lost.down_bytes, lost.up_bytes) == ("train", 300, 0)
    assert lost.reason == "out of memory: training needs 1.5 kB and a box has 1.0 kB"
    assert found.seconds == 3.5


def test_dropouts_come_by_chance_and_at_any_moment() -> None:
    shaky = DeviceProfile("box", 1000.0, 1.0, 100.0, 50.0, latency_seconds=0.5, dropout=0.25)
    clock = clock_of(Policy(), shaky)
    trips = [start_trip(clock, client(f"c{number}"), 1, 0.0, 300, 100) for number in range(2000)]
    after = [found.breakdown.after_seconds for found in trips if found.breakdown]
    # Five standard deviations of a binomial and of a uniform mean.
    assert abs(len(after) - 500) < 97
    assert abs(sum(after) / len(after) - 5.0) < 0.65
    stages = {failure(found).stage for found in trips if found.breakdown}
    assert stages == {"broadcast", "train", "upload"}
    assert trips[:5] == [start_trip(clock, client(f"c{number}"), 1, 0.0, 300, 100) for number in range(5)]


def lost_of(lost: tuple[ClientFailure, ...]) -> Mapping[str, tuple[str, int, int]]:
    return {one.client_id: (one.stage, one.down_bytes, one.up_bytes) for one in lost}


def test_waiting_lasts_as_long_as_the_slowest() -> None:
    closed = close_round(Policy(), TRIPS, 3, 100.0)
    assert (closed.ends, closed.arrived, closed.lost) == (120.0, ("a", "b", "c"), ())


def test_waiting_ends_when_the_last_client_has_come_or_gone() -> None:
    trips = (*TRIPS[:2], trip("b", 4, 10, 6, breaks=17.0))
    closed = close_round(Policy(), trips, 3, 100.0)
    assert (closed.ends, closed.arrived) == (117.0, ("a", "c"))
    # 17 s is halfway through the upload, which began after 14.
    assert lost_of(closed.lost) == {"b": ("upload", 1000, 100)}
    assert close_round(Policy(), (), 3, 100.0).ends == 100.0


@pytest.mark.parametrize(
    ("deadline", "ends", "arrived", "lost"),
    [
        (30.0, 120.0, ("a", "b", "c"), {}),
        (9.0, 109.0, ("a", "c"), {"b": ("train", 1000, 0)}),
        (8.0, 108.0, ("c",), {"a": ("upload", 1000, 100), "b": ("train", 1000, 0)}),
        (1.0, 101.0, (), {"c": ("train", 1000, 0), "a": ("broadcast", 500, 0), "b": ("broadcast", 250, 0)}),
    ],
)
def test_a_deadline_drops_who_is_late_with_the_bytes_that_travelled(
    deadline: float, ends: float, arrived: tuple[str, ...], lost: dict[str, tuple[str, int, int]]
) -> None:
    closed = close_round(Policy("deadline", deadline_seconds=deadline), TRIPS, 3, 100.0)
    assert (closed.ends, closed.arrived, lost_of(closed.lost)) == (ends, arrived, lost)
    for one in closed.lost:
        assert one.reason.startswith("missed the deadline of ")
    if deadline == 8.0:
        assert closed.lost[1].reason == "missed the deadline of 8.0 s: it needs 20.0 s"


def test_over_selection_takes_the_first_and_goes_on() -> None:
    closed = close_round(Policy("over_select"), TRIPS, 2, 100.0)
    assert (closed.ends, closed.arrived) == (109.0, ("a", "c"))
    assert closed.lost[0].reason == "came after the first 2 of 3: it needs 20.0 s"
    assert lost_of(closed.lost) == {"b": ("train", 1000, 0)}
    # Too few are left: it waits for all of them, or for the deadline.
    trips = (trip("a", 1, 2, 1, breaks=0.5), *TRIPS[2:])
    closed = close_round(Policy("over_select"), trips, 2, 100.0)
    assert (closed.ends, closed.arrived, lost_of(closed.lost)) == (120.0, ("b",), {"a": ("broadcast", 500, 0)})
    closed = close_round(Policy("over_select", deadline_seconds=15.0), trips, 2, 100.0)
    assert (closed.ends, closed.arrived) == (115.0, ())


def test_who_comes_at_the_same_moment_is_taken_by_name() -> None:
    trips = tuple(trip(name, 1, 1, 1) for name in ("d", "b", "a", "c"))
    closed = close_round(Policy("over_select"), trips, 2, 0.0)
    assert closed.arrived == ("a", "b")
    assert lost_of(closed.lost) == {"c": ("upload", 1000, 200), "d": ("upload", 1000, 200)}


def test_devices_are_available_at_their_hours() -> None:
    night = DeviceProfile("box", 1.0, 1.0, 1.0, 1.0, availability=0.25, hours=(22.0, 4.0))
    clock = clock_of(Policy(day_seconds=2400.0), night)  # 100 s are an hour.
    for now, expected in ((0.0, 0.0), (399.0, 399.0), (400.0, 2200.0), (2199.0, 2200.0), (2300.0, 2300.0)):
        assert available_from(clock, client(), now) == pytest.approx(expected)
    assert available_from(clock, client(), 2400.0 * 7 + 500) == pytest.approx(2400.0 * 7 + 2200)


def test_other_devices_are_available_for_their_share_of_the_day_at_a_time_of_their_own() -> None:
    some = DeviceProfile("box", 1.0, 1.0, 1.0, 1.0, availability=0.3)
    clock = clock_of(Policy(day_seconds=1000.0), some)
    clients = [client(f"c{number}") for number in range(300)]
    for now in (0.0, 123.4, 87654.3):
        there = [one for one in clients if available_from(clock, one, now) <= now]
        assert abs(len(there) - 90) < 40  # Five standard deviations.
    for one in clients[:20]:
        steps = [available_from(clock, one, float(now)) <= now for now in range(1000)]
        assert 298 <= sum(steps) <= 302
        begins = available_from(clock, one, 5000.0)
        assert available_from(clock, one, begins) == begins


def test_a_round_samples_those_who_are_there_and_waits_for_the_first_where_nobody_is() -> None:
    night = DeviceProfile("box", 1.0, 1.0, 1.0, 1.0, availability=0.25, hours=(18.0, 0.0))
    always = DeviceProfile("pc", 1.0, 1.0, 1.0, 1.0)
    clock = clock_of(Policy(day_seconds=24.0), night, always)
    asleep, awake = [client(f"a{n}") for n in range(5)], [client(f"b{n}", "pc") for n in range(2)]
    begins, cohort = open_round(clock, asleep + awake, 4, 1, 10.0)
    assert (begins, {one.client_id for one in cohort}) == (10.0, {"b0", "b1"})
    begins, cohort = open_round(clock, asleep, 4, 1, 10.0)
    assert begins == pytest.approx(18.0) and len(cohort) == 4
    wide = clock_of(Policy("over_select", over_selection=1.5), always)
    assert len(open_round(wide, [client(f"b{n}", "pc") for n in range(9)], 3, 1, 0.0)[1]) == 5


def test_staleness_makes_changes_count_less() -> None:
    assert Policy(staleness="polynomial", staleness_rate=0.5).discount(3) == 0.5
    assert Policy(staleness="exponential", staleness_rate=0.1).discount(2) == pytest.approx(math.exp(-0.2))
    assert Policy(staleness="constant").discount(9) == 1.0
    assert all(Policy(staleness=kind).discount(0) == 1.0 for kind in ("constant", "polynomial", "exponential"))


@pytest.mark.parametrize(("cohort_size", "number"), [(10, 11), (50, 55), (55, 61), (100, 110), (200, 220)])
def test_over_selection_is_not_one_too_many_by_rounding(cohort_size: int, number: int) -> None:
    assert clients_per_round(Policy("over_select", over_selection=1.1), cohort_size) == number
