"""Defines the further phases of a round, in which clients answer questions about what they trained and hold.

Plain methods have one phase: clients train and send what they trained. A sum that hides its terms takes several: each
client keeps its update, and the server asks for keys, shares, masked numbers. Who asks and who answers exchange bytes,
and neither knows what carries them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast, ClientFailure, Reply, Update

Ask = Callable[[str, Mapping[str, bytes]], Iterator[Reply | ClientFailure]]
"""Kind of the phase, client id -> request -> one reply or failure per request, in their order."""


class PhaseError(FlexLoraError, ValueError):
    """A request that a client cannot or will not answer."""


@dataclass(frozen=True)
class Holding:
    """What a client holds from the end of its training to the end of the round.

    Attributes:
        update: What it trained, after the client ends of all uplink steps; it has not left the client.
        sent: What the client was sent, as it arrived there.
        server_round: The round it trained in.
        seed: Of the client's own random choices in the phases of this round.
    """

    update: Update
    sent: Broadcast
    server_round: int
    seed: int


@runtime_checkable
class HoldingClient(Protocol):
    """A client in the further phases of one round; it remembers what it needs between them."""

    def answer(self, kind: str, request: bytes) -> bytes:
        """Return the reply to a request of this kind; any error fails this client alone.

        Raises:
            PhaseError: If there is no such kind, or it is not its turn.
        """
        ...


@runtime_checkable
class ClientPhases(Protocol):
    """Says what clients do in the further phases of a round: plain values, which travel with the order of a round."""

    def begin(self, holding: Holding) -> HoldingClient:
        """Return a client that has trained and will be asked."""
        ...
