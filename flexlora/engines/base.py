"""Defines what an engine is: it takes the order of a round and yields one outcome per client."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, ClientFailure, KeptFactors, Reply, Update
from flexlora.uplink.base import UplinkStep
from flexlora.uplink.compression import Compression
from flexlora.uplink.phases import ClientPhases
from flexlora.uplink.wire import WireDtype, decode_broadcast, encode_broadcast

ParcelKey = RankPlan | str
"""Whom a parcel is for: all clients of a rank plan, or the one with this id."""


@dataclass(frozen=True, eq=False)
class Parcel:
    """A broadcast on its way to clients, to all of one rank plan or to one: encoded and decoded once, when needed.

    Attributes:
        broadcast: What the server sends.
        wire_dtype: Dtype of the factors on their way.
        came_as: The bytes that ``broadcast`` was decoded from, where it has travelled already; they go on unchanged.
    """

    broadcast: Broadcast
    wire_dtype: WireDtype
    came_as: bytes | None = None

    @cached_property
    def packet(self) -> bytes:
        """The broadcast as bytes."""
        return encode_broadcast(self.broadcast, self.wire_dtype) if self.came_as is None else self.came_as

    @cached_property
    def arrived(self) -> Broadcast:
        """What a client makes of the bytes; shared by all it is for, so nobody may change it."""
        return decode_broadcast(self.packet) if self.came_as is None else self.broadcast


@dataclass(frozen=True, eq=False)
class RoundOrder:
    """Everything an engine needs to train the cohort of a round.

    Attributes:
        server_round: The round whose broadcasts the clients start from.
        seed: Of the run; each client in each round has a stream of its own.
        learning_rate: Of every client in this round.
        wire_dtype: Dtype of the factors on their way, in both directions.
        uplink: The steps whose client ends run on each update before it is encoded.
        cohort: Who trains.
        parcels: What clients are sent: one for each rank plan, or one for each client if all get their own.
        kept: Client id -> what it kept of an earlier round: a factor, or what rounding lost; those that have none are
            missing.
        phases: What clients do in the further phases of the round; they hold what they train and send word of it only.
            None sends updates.
        compression: How updates are made smaller than ``wire_dtype``; None sends them in that.
    """

    server_round: int
    seed: int
    learning_rate: float
    wire_dtype: WireDtype
    uplink: Sequence[UplinkStep]
    cohort: Sequence[ClientSpec]
    parcels: Mapping[ParcelKey, Parcel]
    kept: Mapping[str, KeptFactors] = field(default_factory=dict)
    phases: ClientPhases | None = None
    compression: Compression | None = None

    def key_of(self, client: ClientSpec) -> ParcelKey:
        """Return the key of the parcel that a client is sent."""
        return client.client_id if client.client_id in self.parcels else client.plan

    def parcel_of(self, client: ClientSpec) -> Parcel:
        """Return what a client is sent: its own parcel, or that of its rank plan."""
        return self.parcels[self.key_of(client)]


@runtime_checkable
class Engine(Protocol):
    """Trains the clients of a round; a failing client is yielded as a ``ClientFailure``, never raised."""

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order."""
        ...


@runtime_checkable
class PhasedEngine(Protocol):
    """An engine whose rounds can have further phases; clients hold what they trained under ``RoundOrder.phases``."""

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort, in cohort order; under ``phases`` updates are held."""
        ...

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request, in their order.

        Args:
            kind: The phase; it becomes the stage of a failure.
            requests: Client id -> what it is asked; each client has trained in this round and holds its update.
        """
        ...

    def forget(self) -> None:
        """End the round: clients drop what they hold, at the latest before they train again."""
        ...
