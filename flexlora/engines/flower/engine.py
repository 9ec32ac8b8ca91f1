"""Trains a cohort on the SuperNodes of a Flower federation, with our own sampling and our own loop over the Grid."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from flexlora.engines.base import ParcelKey, RoundOrder
from flexlora.engines.flower.envelope import Envelope
from flexlora.engines.flower.exchange import Fault, replies_as_they_come, replies_in_order, send
from flexlora.engines.flower.nodes import ClientNodes
from flexlora.engines.flower.phase_names import phases_name
from flexlora.engines.flower.records import factors_record
from flexlora.engines.flower.replies import phase_reply_of, update_of
from flexlora.engines.flower.run_settings import RunSettings
from flexlora.engines.simulation import reason_of
from flexlora.errors import FlexLoraError
from flexlora.federation.clients import ClientSpec
from flexlora.federation.messages import ClientFailure, Reply, Update
from flexlora.uplink.compression import remembered_round

_SPARE_SECONDS = 60.0


class FlowerEngineError(FlexLoraError, ValueError):
    """An order that cannot be carried out over Flower."""


@dataclass(frozen=True)
class Patience:
    """How long a round waits for its clients, in real time.

    Attributes:
        deadline_seconds: From sending to the last reply that counts; None waits for everybody.
        num_wanted: The round ends after this many updates, where more clients were asked; None waits for everybody.
        rejoin_seconds: How long a round waits for a client of its cohort that is not connected when it begins.
    """

    deadline_seconds: float | None = None
    num_wanted: int | None = None
    rejoin_seconds: float = 60.0


@dataclass(frozen=True)
class FlowerEngine:
    """An engine whose clients train on the nodes of a federation.

    Replies wait at the SuperLink and are taken a few at a time, so that memory does not grow with the cohort.

    Attributes:
        grid: Of the run.
        run: What every client is told about it.
        nodes: Which node is which client.
        patience: How long to wait.
    """

    grid: Grid
    run: RunSettings
    nodes: ClientNodes
    patience: Patience = Patience()

    def train(self, order: RoundOrder) -> Iterator[Update | ClientFailure]:
        """Yield one outcome per client of the order's cohort.

        In cohort order, so that a run can be repeated; as they come where more clients were asked than are wanted,
        because which of them count then depends on their speed anyway.

        Raises:
            FlowerEngineError: If the order has uplink steps, whose client ends cannot be sent.
        """
        if order.uplink:
            raise FlowerEngineError("steps of the uplink cannot be sent to the clients of a Flower federation")
        if order.phases is not None and phases_name(order.phases) is None:
            raise FlowerEngineError(f"clients of a Flower federation know no phases of {type(order.phases).__name__}")
        self._held[:] = [order.server_round]
        names = {client.client_id for client in order.cohort}
        self.nodes.wait_for(names.issubset, self.patience.rejoin_seconds)
        seconds = self.patience.deadline_seconds
        ends = None if seconds is None else time.monotonic() + seconds
        sent = self._send_all(order)
        if self.patience.num_wanted is None:
            yield from self._in_order(order, sent, ends)
        else:
            yield from self._first_to_come(order, sent, ends, self.patience.num_wanted)

    def ask(self, kind: str, requests: Mapping[str, bytes]) -> Iterator[Reply | ClientFailure]:
        """Yield one reply or failure per request, in their order.

        Args:
            kind: The phase.
            requests: Client id -> what it is asked; each has trained in the last round and holds its update.
        """
        (server_round,) = self._held
        seconds = self.patience.deadline_seconds
        ends = None if seconds is None else time.monotonic() + seconds
        due = {"run_id": self.run.run_id, "server_round": server_round, "phase": kind}
        sent: dict[str, str | ClientFailure] = {}
        for client_id, payload in requests.items():
            fields = {"run": self.run.model_dump(mode="json"), "client_id": client_id, **due}
            request = Envelope("ask", fields, payload)
            try:
                node_id = self._node_of(client_id)
                sent[client_id] = send(self.grid, node_id, request, str(server_round), self._expires)
            except Exception as error:  # As in training: one that cannot be reached must not end the phase.
                sent[client_id] = ClientFailure(client_id, kind, reason_of(error))
        replies = replies_in_order(self.grid, [one for one in sent.values() if isinstance(one, str)], ends)
        for client_id, own in sent.items():
            if isinstance(own, ClientFailure):
                yield own
                continue
            reply, size = next(replies), len(requests[client_id])
            if isinstance(reply, Fault):
                yield ClientFailure(client_id, kind, reply.reason, size)
            else:
                yield phase_reply_of(reply, client_id, {**due, "client_id": client_id}, size)

    def forget(self) -> None:
        """End the round; clients drop what they hold when they train again."""

    @cached_property
    def _held(self) -> list[int]:
        """The round whose further phases may be asked for."""
        return []

    @property
    def _expires(self) -> float | None:
        """After how many seconds Flower drops a message: not so early that it is Flower that decides who is late."""
        deadline = self.patience.deadline_seconds
        return None if deadline is None else 2 * deadline + _SPARE_SECONDS

    def _node_of(self, client_id: str) -> int:
        node_id = self.nodes.node_of(client_id)
        if node_id is None:
            raise FlowerEngineError(
                f"it was not connected when the round began, nor in the {self.patience.rejoin_seconds:g} s after that"
            )
        return node_id

    def _send_all(self, order: RoundOrder) -> dict[str, str | ClientFailure]:
        """Send every client its request; return client id -> message id, or why it could not be sent."""
        records: dict[ParcelKey, ArrayRecord] = {}
        sent: dict[str, str | ClientFailure] = {}
        for client in order.cohort:
            try:
                sent[client.client_id] = self._send(order, client, records)
            except Exception as error:  # One client that cannot be reached must not end the round of the others.
                sent[client.client_id] = ClientFailure(client.client_id, "broadcast", reason_of(error))
        return sent

    def _send(self, order: RoundOrder, client: ClientSpec, records: dict[ParcelKey, ArrayRecord]) -> str:
        node_id = self._node_of(client.client_id)
        key, packet = order.key_of(client), order.parcel_of(client).packet
        if key not in records:
            records[key] = factors_record(packet)
        fields = {
            "run": self.run.model_dump(mode="json"),
            "client_id": client.client_id,
            "server_round": order.server_round,
            "learning_rate": order.learning_rate,
            "phases": None if order.phases is None else phases_name(order.phases),
            "remembers": remembered_round(order.kept.get(client.client_id)),
        }
        request = Envelope("train", fields, packet)
        return send(self.grid, node_id, request, str(order.server_round), self._expires, records[key])

    def _in_order(
        self, order: RoundOrder, sent: dict[str, str | ClientFailure], ends: float | None
    ) -> Iterator[Update | ClientFailure]:
        ids = [one for one in sent.values() if isinstance(one, str)]
        replies = replies_in_order(self.grid, ids, ends)
        for client in order.cohort:
            own = sent[client.client_id]
            yield own if isinstance(own, ClientFailure) else self._outcome(next(replies), client, order)

    def _first_to_come(
        self, order: RoundOrder, sent: dict[str, str | ClientFailure], ends: float | None, num_wanted: int
    ) -> Iterator[Update | ClientFailure]:
        client_of = {own: client for client in order.cohort if isinstance(own := sent[client.client_id], str)}
        yield from (own for own in sent.values() if isinstance(own, ClientFailure))
        num_updates, replies = 0, replies_as_they_come(self.grid, list(client_of), ends)
        while client_of and num_updates < num_wanted and (found := next(replies, None)) is not None:
            outcome = self._outcome(found[1], client_of.pop(found[0]), order)
            num_updates += isinstance(outcome, Update)
            yield outcome
        reason = (
            f"the round ended when {num_wanted} updates were there"
            if num_updates >= num_wanted
            else "its reply did not come before the deadline of the round"
        )
        for client in client_of.values():
            yield self._outcome(Fault("stale", reason), client, order)

    def _outcome(self, reply: Envelope | Fault, client: ClientSpec, order: RoundOrder) -> Update | ClientFailure:
        if isinstance(reply, Fault):
            return ClientFailure(client.client_id, reply.stage, reply.reason, len(order.parcel_of(client).packet))
        try:
            return update_of(reply, client, order, self.run)
        except Exception as error:  # What a stranger may send cannot be listed; the others' round goes on.
            size = len(order.parcel_of(client).packet)
            return ClientFailure(client.client_id, "validate", reason_of(error), size, len(reply.payload))
