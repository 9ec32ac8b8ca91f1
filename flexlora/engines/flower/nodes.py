"""Learns which Flower node is which client, by asking every node that appears to describe itself.

A client that is restarted comes back as another node with the same name. As long as the node that had the name first is
connected, requests go to that one.
"""

import logging
import time
from collections.abc import Callable, Collection

from flwr.serverapp import Grid

from flexlora.engines.flower.envelope import Envelope, EnvelopeError
from flexlora.engines.flower.exchange import Fault, pulled, send
from flexlora.engines.flower.replies import Description, read_description
from flexlora.engines.flower.run_settings import RunSettings

_PAUSE_SECONDS = 0.25

_log = logging.getLogger(__name__)


class ClientNodes:
    """The nodes of a run.

    Args:
        grid: Of the run.
        run: What every node is told.
        notify: Told a line whenever a client joins, leaves or is refused.
        name_of_key: Node id -> the name of the key that the node has proved itself with; None where nodes have no keys,
            and may call themselves anything.

    Attributes:
        run: What every node is told.
        refused: Node id -> why it cannot take part.
    """

    def __init__(
        self,
        grid: Grid,
        run: RunSettings,
        notify: Callable[[str], None] = lambda line: None,
        name_of_key: Callable[[int], str | None] | None = None,
    ) -> None:
        self._grid, self.run, self._notify, self._name_of_key = grid, run, notify, name_of_key
        # Message id -> the node that was asked; node id -> what it said, in the order of the answers.
        self._asked: dict[str, int] = {}
        self._described: dict[int, Description] = {}
        self._online: frozenset[int] = frozenset()
        self.refused: dict[int, str] = {}

    def look(self) -> None:
        """Ask the nodes that are new, and take the answers that are there."""
        online = frozenset(self._grid.get_node_ids())
        for node_id in sorted(self._online - online):
            if node_id in self._described:
                self._notify(f"{self._described[node_id].spec.client_id} has left")
        known = {*self._asked.values(), *self._described, *self.refused}
        for node_id in sorted(online - known):
            asked = Envelope("describe", {"run": self.run.model_dump(mode="json")})
            try:
                self._asked[send(self._grid, node_id, asked, "describe", None)] = node_id
            except EnvelopeError as error:
                _log.warning("Node %d could not be asked: %s", node_id, error)
        self._online = online
        for message_id, reply in pulled(self._grid, list(self._asked)).items():
            self._take(self._asked.pop(message_id), reply)

    def _take(self, node_id: int, reply: Envelope | Fault) -> None:
        try:
            if isinstance(reply, Fault):
                raise EnvelopeError(reply.reason)
            found = read_description(reply, self.run)
            self._check_name(node_id, found.spec.client_id)
            self._described[node_id] = found
        except EnvelopeError as error:
            self.refused[node_id] = str(error)
            self._notify(f"node {node_id} cannot take part: {error}")
            return
        spec, name = found.spec, found.spec.client_id
        if self.node_of(name) != node_id:
            self._notify(f"{name} is connected twice; the one that came first takes part")
            return
        self._notify(f"{name} has joined: {spec.plan.name}, {spec.num_examples} examples, {found.device}")

    def _check_name(self, node_id: int, name: str) -> None:
        """Refuse a client that calls itself as another one: it would be sent, and answer for, what is that one's."""
        own = name if self._name_of_key is None else self._name_of_key(node_id)
        if own != name:
            raise EnvelopeError(
                f"its key is that of {own or 'nobody'}, and it calls itself {name}; use --name {own or 'NAME'}"
            )

    def connected(self) -> dict[str, Description]:
        """Return client id -> description of the clients that were connected at the last look, sorted."""
        found: dict[str, Description] = {}
        for node_id, own in self._described.items():
            if node_id in self._online:
                found.setdefault(own.spec.client_id, own)
        return dict(sorted(found.items()))

    def node_of(self, client_id: str) -> int | None:
        """Return the node of a client, None if it was not connected at the last look."""
        for node_id, own in self._described.items():
            if own.spec.client_id == client_id and node_id in self._online:
                return node_id
        return None

    @property
    def num_pending(self) -> int:
        """How many connected nodes have not answered yet."""
        return sum(node_id in self._online for node_id in self._asked.values())

    def wait_for(self, is_enough: Callable[[Collection[str]], bool], seconds: float) -> bool:
        """Look until enough clients are connected; return whether they are.

        Args:
            is_enough: Told the names of the connected clients.
            seconds: How long to wait at most.
        """
        ends = time.monotonic() + seconds
        while True:
            self.look()
            if is_enough(self.connected()):
                return True
            if time.monotonic() >= ends:
                return False
            time.sleep(_PAUSE_SECONDS)
