"""Takes masked sums over the clients of a round: asks phase after phase, and counts what each of them cost.

The client's end answers the phases ``keys``, ``shares`` and ``unmask``; what is summed, and so the phases in between,
are for the caller to define (``secure_sum``).
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import ClientFailure
from flexlora.uplink.base import PhaseCost, Traffic
from flexlora.uplink.fixed_point import Layout, Numbers, arrived, decoded
from flexlora.uplink.masking_client import MaskingClient
from flexlora.uplink.masking_server import MaskedSumError, MaskingServer
from flexlora.uplink.phase_messages import Fields, fields_and_tensors, message
from flexlora.uplink.phases import Ask

MASKING_KINDS = ("keys", "shares", "unmask")
_WORDS = "words"


@dataclass(frozen=True)
class SumOfNumbers:
    """A sum that was unmasked.

    Attributes:
        counts: Name -> sums of counts.
        values: Name -> sums of numbers, flat.
        survivors: Whose numbers are in it, sorted.
    """

    counts: Mapping[str, list[int]]
    values: Mapping[str, Numbers]
    survivors: list[str]


@dataclass
class MaskedSums:
    """The masked sums of one round.

    Attributes:
        server: The server's end.
        ask: Asks clients.
        traffic: Of the phases so far.
    """

    server: MaskingServer
    ask: Ask
    traffic: Traffic = field(default_factory=Traffic)

    def open(self) -> None:
        """Let clients exchange keys and shares.

        Raises:
            MaskedSumError: If too few take part.
        """
        self._exchange("keys", self.server.keys_requests(), self.server.take_keys)
        self._exchange("shares", self.server.shares_requests(), self.server.take_shares)

    def total(
        self, kind: str, layout: Layout, fields_of: Callable[[str], Fields], tensors: Mapping[str, Tensor]
    ) -> SumOfNumbers:
        """Return the sum of the numbers that clients give in a phase of this kind.

        Args:
            kind: Of the phase.
            layout: Of the numbers.
            fields_of: Client -> what it is told besides.
            tensors: What all are told.

        Raises:
            MaskedSumError: If too few clients survive; nothing of the sum is known then.
        """
        told = {one: {**fields_of(one), **fields} for one, fields in self.server.sum_requests().items()}

        def take(client_id: str, fields: Fields, found: Mapping[str, Tensor]) -> None:
            """Add the words of one client."""
            if _WORDS not in found or found[_WORDS].dtype != torch.uint8:
                raise MaskedSumError("a reply must hold the masked words, as bytes")
            self.server.take_masked(client_id, arrived(layout, found[_WORDS].numpy()))

        self._asked(kind, told, tensors, take)
        self.server.close_sum()
        self._exchange("unmask", self.server.unmask_requests(), self.server.take_unmask)
        words, survivors = self.server.unmasked()
        counts, values = decoded(layout, words)
        return SumOfNumbers(counts, values, survivors)

    def _exchange(
        self, kind: str, requests: Mapping[str, Fields], take: Callable[[Mapping[str, Fields]], Mapping[str, str]]
    ) -> None:
        """Ask and let the server take all replies at once."""
        replies: dict[str, Fields] = {}

        def keep(client_id: str, fields: Fields, found: Mapping[str, Tensor]) -> None:
            """Keep the reply of one client."""
            replies[client_id] = fields

        self._asked(kind, requests, {}, keep)
        for client_id, reason in take(replies).items():
            self._fail(kind, client_id, reason)
            self.traffic.costs[-1].num_answered -= 1

    def _asked(
        self,
        kind: str,
        requests: Mapping[str, Fields],
        tensors: Mapping[str, Tensor],
        take: Callable[[str, Fields, Mapping[str, Tensor]], None],
    ) -> None:
        """Ask clients and take their replies one at a time; those that cannot be used are failures."""
        start, cost = time.perf_counter(), PhaseCost(kind, len(requests))
        self.traffic.costs.append(cost)
        packets = {client_id: message(fields, tensors) for client_id, fields in requests.items()}
        for client_id, packet in packets.items():
            cost.down_bytes += len(packet)
            self.traffic.down_bytes[client_id] = self.traffic.down_bytes.get(client_id, 0) + len(packet)
        for reply in self.ask(kind, packets):
            client_id = reply.client_id
            if client_id not in requests:
                continue
            if isinstance(reply, ClientFailure):
                self._fail(kind, client_id, reply.reason)
                continue
            cost.up_bytes += len(reply.data)
            self.traffic.up_bytes[client_id] = self.traffic.up_bytes.get(client_id, 0) + len(reply.data)
            try:
                take(client_id, *fields_and_tensors(reply.data))
            except FlexLoraError as error:
                self._fail(kind, client_id, str(error))
            else:
                cost.num_answered += 1
        cost.seconds = time.perf_counter() - start

    def _fail(self, kind: str, client_id: str, reason: str) -> None:
        self.traffic.failures[client_id] = ClientFailure(
            client_id, kind, reason, self.traffic.down_bytes.get(client_id, 0), self.traffic.up_bytes.get(client_id, 0)
        )


def masking_reply(client: MaskingClient, kind: str, request: bytes) -> bytes:
    """Return a client's reply in one of ``MASKING_KINDS``.

    Raises:
        FlexLoraError: If the client refuses, or the request is damaged.
    """
    answer = {"keys": client.keys, "shares": client.shares, "unmask": client.unmask}[kind]
    return message(answer(fields_and_tensors(request)[0]))


def words_message(data: Tensor) -> bytes:
    """Return the reply that holds masked words, as the bytes of ``fixed_point.on_the_way``."""
    assert data.dtype == torch.uint8
    return message({}, {_WORDS: data})
