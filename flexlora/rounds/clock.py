"""Keeps virtual time: who is available, how long each client takes, whose update counts and when a round ends.

Nothing here waits or trains. Every decision is a function of the seed, the round, the client and the time before, so a
resumed run decides as an uninterrupted one does. The server's own work takes no virtual time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flexlora.federation.clients import ClientSpec, RankPlan, sample_cohort
from flexlora.federation.messages import ClientFailure
from flexlora.federation.streams import stream, stream_seed
from flexlora.rounds.costs import ClientCost, device_cost
from flexlora.rounds.devices import HOURS_PER_DAY, DeviceProfile
from flexlora.text import bytes_text, seconds_text

PolicyName = Literal["wait", "deadline", "over_select", "async"]


Sizes = Callable[[RankPlan], tuple[int, int]]
"""Rank plan -> bytes of a broadcast and of an update, serialised."""


ROUNDING = 1e-9


@dataclass(frozen=True)
class Policy:
    """How the server deals with clients that differ in speed; the fields are those of ``clock`` in the configuration.

    Attributes:
        name: ``wait`` for everybody; ``deadline`` drops late clients; ``over_select`` samples more and takes the first;
            ``async`` never waits for a cohort.
        deadline_seconds: When clients still at work are dropped, for ``deadline``; also bounds ``over_select``.
        over_selection: Clients sampled per client wanted, at least 1.
        jitter: Standard deviation of the logarithm of the factor on a client's time in a round.
        day_seconds: Length of a virtual day, over which availability repeats.
        buffer_size: Updates per server step of ``async``.
        staleness: How the weight of a change falls with its staleness ``t``: ``(1 + t) ** -rate`` (``polynomial``),
            ``exp(-rate * t)`` (``exponential``) or not at all (``constant``).
        staleness_rate: The rate in these formulas.
        max_staleness: Staler updates are dropped; None drops none.
    """

    name: PolicyName = "wait"
    deadline_seconds: float | None = None
    over_selection: float = 1.3
    jitter: float = 0.0
    day_seconds: float = 86400.0
    buffer_size: int = 1
    staleness: Literal["constant", "polynomial", "exponential"] = "polynomial"
    staleness_rate: float = 0.5
    max_staleness: int | None = None

    def discount(self, staleness: int) -> float:
        """Return the factor on a change whose client was sent a model ``staleness`` server steps old."""
        if self.staleness == "polynomial":
            return (1.0 + staleness) ** -self.staleness_rate
        return math.exp(-self.staleness_rate * staleness) if self.staleness == "exponential" else 1.0


@dataclass(frozen=True)
class Clock:
    """The rules of virtual time, without state.

    Attributes:
        profiles: Device name -> profile, for every device that a client has.
        cost_of: What a round of local training costs a client on its device.
        policy: How the server deals with slow clients.
        seed: Of the run.
    """

    profiles: Mapping[str, DeviceProfile]
    cost_of: Callable[[ClientSpec], ClientCost]
    policy: Policy
    seed: int


@dataclass(frozen=True)
class Breakdown:
    """Why a client fails on its own, and when: ``after_seconds`` from the start of its trip."""

    after_seconds: float
    reason: str


@dataclass(frozen=True)
class Trip:
    """One client's trip through a round: download, training, upload.

    Attributes:
        client_id: The client.
        server_round: The round whose broadcast it trains from.
        starts: When it starts, in virtual seconds.
        download_seconds: Latency included, as in the upload.
        compute_seconds: Local training.
        upload_seconds: Until the server has the update.
        down_bytes: Of the broadcast.
        up_bytes: Of the update.
        breakdown: Its failure, if it fails on its own.
    """

    client_id: str
    server_round: int
    starts: float
    download_seconds: float
    compute_seconds: float
    upload_seconds: float
    down_bytes: int
    up_bytes: int
    breakdown: Breakdown | None = None

    @property
    def needed_seconds(self) -> float:
        """From start to arrival if nothing fails."""
        return self.download_seconds + self.compute_seconds + self.upload_seconds

    @property
    def seconds(self) -> float:
        """From start to arrival or failure."""
        return self.needed_seconds if self.breakdown is None else self.breakdown.after_seconds

    @property
    def ends(self) -> float:
        """When its update arrives or it fails."""
        return self.starts + self.seconds


@dataclass(frozen=True)
class ClosedRound:
    """How a round on the clock ended.

    Attributes:
        ends: When the server moves on, in virtual seconds.
        arrived: Ids of the clients whose updates count, sorted.
        lost: The others, sorted by id.
    """

    ends: float
    arrived: tuple[str, ...]
    lost: tuple[ClientFailure, ...]


@dataclass(frozen=True)
class ClockState:
    """Where virtual time stands between two rounds.

    Attributes:
        now: Virtual seconds since the start of the run.
        num_sent: Trips started so far by ``async``.
        trips: Trips under way by ``async``, in the order in which they started.
    """

    now: float = 0.0
    num_sent: int = 0
    trips: tuple[Trip, ...] = ()


def open_round(
    clock: Clock, clients: Sequence[ClientSpec], cohort_size: int, server_round: int, now: float
) -> tuple[float, tuple[ClientSpec, ...]]:
    """Return when a round begins, and its cohort: what ``sample_cohort`` draws from the clients available then.

    It begins at ``now`` or, if nobody is available, as soon as somebody is. If too few are, the cohort is smaller.
    """
    moments = [available_from(clock, client, now) for client in clients]
    begins = min(moments, default=now)
    present = [client for client, moment in zip(clients, moments, strict=True) if moment <= begins]
    return begins, sample_cohort(present, clients_per_round(clock.policy, cohort_size), clock.seed, server_round)


def clients_per_round(policy: Policy, cohort_size: int) -> int:
    """Return how many clients a round samples, or waits for under ``async``, if enough are available."""
    if policy.name == "over_select":
        # In floating point, 1.1 times 50 is a little more than 55.
        return math.ceil(cohort_size * policy.over_selection - ROUNDING)
    return policy.buffer_size if policy.name == "async" else cohort_size


def available_from(clock: Clock, client: ClientSpec, now: float) -> float:
    """Return the first moment, not before ``now``, at which a client can be sampled.

    A device is available for one stretch of each day: at its hours, or beginning at a moment of its own that depends
    on the seed and the client alone.
    """
    profile, day = clock.profiles[client.device], clock.policy.day_seconds
    if profile.availability >= 1.0:
        return now
    if profile.hours is None:
        begin = stream_seed(clock.seed, "availability", client.client_id) / 2**63 * day
    else:
        begin = profile.hours[0] / HOURS_PER_DAY * day
    since = (now - begin) % day
    # The moment returned may round to just before the stretch. That counts as inside, or nobody might ever be there.
    is_available = since < profile.availability * day or day - since < ROUNDING * day
    return now if is_available else now + (day - since)


def start_trip(
    clock: Clock, client: ClientSpec, server_round: int, starts: float, down_bytes: int, up_bytes: int
) -> Trip:
    """Return one client's trip, starting at ``starts``, and whether it fails on its own.

    A client without enough memory fails when training begins; one that drops out may do so at any moment of its trip.
    """
    profile = clock.profiles[client.device]
    cost = device_cost(profile, clock.cost_of(client), down_bytes, up_bytes)
    key = (server_round, client.client_id)
    factor = 1.0
    if clock.policy.jitter:
        factor = math.exp(clock.policy.jitter * stream(clock.seed, "jitter", *key).standard_normal())
    download, compute, upload = (
        factor * seconds for seconds in (cost.download_seconds, cost.compute_seconds, cost.upload_seconds)
    )
    breakdown = None
    if cost.memory_bytes > profile.memory_bytes:
        needed, available = bytes_text(cost.memory_bytes), bytes_text(profile.memory_bytes)
        breakdown = Breakdown(download, f"out of memory: training needs {needed} and a {profile.name} has {available}")
    if profile.dropout:
        rng = stream(clock.seed, "dropout", *key)
        drops_out, after = rng.random() < profile.dropout, rng.random() * (download + compute + upload)
        if drops_out and (breakdown is None or after < breakdown.after_seconds):
            breakdown = Breakdown(after, f"dropped out after {seconds_text(after)}")
    return Trip(client.client_id, server_round, starts, download, compute, upload, down_bytes, up_bytes, breakdown)


def close_round(policy: Policy, trips: Sequence[Trip], wanted: int, begins: float) -> ClosedRound:
    """Return how a round ends whose clients all started together.

    Args:
        policy: Any but ``async``.
        trips: One per client, all starting at ``begins``.
        wanted: How many updates ``over_select`` takes.
        begins: When the round begins.
    """
    limit, why = math.inf, ""
    if policy.deadline_seconds is not None:
        limit, why = policy.deadline_seconds, f"missed the deadline of {seconds_text(policy.deadline_seconds)}"
    in_time = sorted(
        (trip for trip in trips if trip.breakdown is None and trip.seconds <= limit),
        key=lambda trip: (trip.seconds, trip.client_id),
    )
    if policy.name == "over_select" and len(in_time) >= wanted:
        in_time = in_time[:wanted]
        limit, why = in_time[-1].seconds, f"came after the first {wanted} of {len(trips)}"
    arrived = {trip.client_id for trip in in_time}
    lost = []
    for trip in sorted(trips, key=lambda trip: trip.client_id):
        if trip.breakdown is not None and trip.breakdown.after_seconds <= limit:
            lost.append(failure(trip))
        elif trip.client_id not in arrived:
            lost.append(failure(trip, limit, f"{why}: it needs {seconds_text(trip.needed_seconds)}"))
    seconds = min(limit, max((trip.seconds for trip in trips), default=0.0))
    return ClosedRound(begins + seconds, tuple(sorted(arrived)), tuple(lost))


def failure(trip: Trip, after_seconds: float | None = None, reason: str = "", stage: str = "") -> ClientFailure:
    """Return the failure of a client whose trip is cut short, with the bytes that had travelled by then.

    Args:
        trip: The trip.
        after_seconds: When the server gives up on it; None if the client fails on its own.
        reason: Why the server gives up.
        stage: Overrides the stage that the trip had reached.
    """
    if after_seconds is None:
        assert trip.breakdown is not None, "a trip without a breakdown ends when the server says so"
        after_seconds, reason = trip.breakdown.after_seconds, trip.breakdown.reason
    if after_seconds < trip.download_seconds:
        reached, down, up = "broadcast", after_seconds / trip.download_seconds, 0.0
    elif after_seconds < trip.download_seconds + trip.compute_seconds:
        reached, down, up = "train", 1.0, 0.0
    else:
        left = trip.needed_seconds - after_seconds
        reached, down, up = "upload", 1.0, 1.0 - left / trip.upload_seconds if left > 0 else 1.0
    return ClientFailure(trip.client_id, stage or reached, reason, int(down * trip.down_bytes), int(up * trip.up_bytes))
