"""Connects a client to a SuperLink and takes its messages, without the pauses of Flower's own loop.

A stock SuperNode looks for messages every three seconds and starts a new process for each. This connection speaks the
same Fleet interface with Flower's own client, looks several times a second, and leaves the answer to its caller.
"""

import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, Status
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from flexlora.engines.flower.children import reach_directly
from flexlora.engines.flower.refusals import LostError, RefusedError, RunOverError, UnknownKeyError, refusal
from flexlora.engines.flower.superlink import is_loopback
from flexlora.engines.flower.transfers import whole_message

_SECONDS_BETWEEN_HEARTBEATS = HEARTBEAT_MIN_INTERVAL / 2
"""Flower takes a node for gone after two of its shortest intervals without a sign of life."""

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Place:
    """Where a server is and how it is told from others.

    Attributes:
        address: HOST:PORT.
        authority: File with the certificate that the server's must be signed by; None connects without TLS.
        key: What the client proves itself with; None without TLS.
    """

    address: str
    authority: Path | None = None
    key: ec.EllipticCurvePrivateKey | None = None


class Connection:
    """A connection to a SuperLink that is kept alive by a thread of its own."""

    def __init__(self, place: Place) -> None:
        """Connect nothing yet.

        Raises:
            RefusedError: If the authority's certificate cannot be read.
        """
        self._place = place
        host = place.address.rpartition(":")[0].strip("[]")
        if is_loopback(host):
            reach_directly(host)
        key = place.key or generate_key_pairs()[0]
        self._public_key = public_key_to_bytes(key.public_key())
        try:
            self._client = FleetHttpClient(
                f"{'http' if place.authority is None else 'https'}://{place.address}",
                interceptors=[
                    RuntimeVersionHttpInterceptor("SuperNode"),
                    NodeAuthHttpInterceptor(key, key.public_key()),
                ],
                verify=place.authority is None or ssl.create_default_context(cafile=str(place.authority)),
            )
        except OSError as error:
            raise RefusedError(f"--ca must be a certificate in PEM format; {place.authority}: {error}") from error
        self._node = Node()
        self._over = threading.Event()
        self._heartbeats = threading.Thread(target=self._beat, daemon=True)

    @property
    def node_id(self) -> int:
        """The number that Flower gave this client; 0 before it has connected."""
        return self._node.node_id

    def connect(self, earlier_node: int = 0) -> None:
        """Tell the SuperLink that this client is there.

        Args:
            earlier_node: The number of this client before it was killed, which the SuperLink may still count as there.

        Raises:
            RefusedError: If the server does not let it in, or is not the one that is meant.
            LostError: If there is nobody at the address.
        """
        self._node = Node()
        if earlier_node:
            with suppress(LostError, RefusedError, RunOverError):
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=earlier_node))
        if self._place.key is None:
            # It may be known already, from before the connection was lost.
            with suppress(UnknownKeyError, LostError):
                self._call(self._client.RegisterNode, RegisterNodeFleetRequest(public_key=self._public_key))
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        self._node = Node(node_id=self._call(self._client.ActivateNode, request).node_id)
        if not self._heartbeats.is_alive():
            self._heartbeats.start()

    def receive(self) -> Message | None:
        """Take the next message for this client; None if there is none.

        Raises:
            LostError: If the connection is gone; ``connect`` may bring it back.
        """
        answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        announced, tree = answer.messages_list[0], answer.message_object_trees[0]
        run_id = announced.metadata.run_id
        pull = make_pull_object_fn_protobuf(partial(self._call, self._client.PullObject), self._node, run_id)
        confirm = make_confirm_message_received_fn_protobuf(
            partial(self._call, self._client.ConfirmMessageReceived), self._node, run_id
        )
        try:
            return whole_message(announced, tree, pull, confirm)
        except (ObjectPullError, ObjectUnavailableError) as error:
            raise LostError(f"a message could not be taken from {self._place.address}: {error}") from error

    def reply(self, message: Message, content: RecordDict, seconds: float) -> None:
        """Answer a message.

        Args:
            message: What ``receive`` gave.
            content: Of the reply.
            seconds: How long the answer took to make, for Flower's own displays.

        Raises:
            LostError: If the connection is gone; the reply is then lost.
            RunOverError: If the run has ended meanwhile.
        """
        with no_object_id_recompute():
            answer = Message(content, reply_to=message)
            answer.metadata.__dict__["_message_id"] = answer.object_id
            tree, objects = get_object_tree(answer), get_all_nested_objects(answer)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            accepted = self._call(self._client.PushMessages, request)
            push = make_push_object_fn_protobuf(
                partial(self._call, self._client.PushObject), self._node, message.metadata.run_id, accepted.session_id
            )
            try:
                push_objects(objects, push, object_ids_to_push=set(accepted.objects_to_push))
            except ObjectPushError as error:
                raise LostError(f"a reply could not be brought to {self._place.address}: {error}") from error

    def run_is_over(self, run_id: int) -> bool:
        """Return whether a run has ended, as its server says.

        Raises:
            LostError: If the connection is gone.
        """
        try:
            answer = self._call(self._client.GetRun, GetRunRequest(node=self._node, run_id=run_id))
        except RunOverError:
            return True
        return run_from_proto(answer.run).status.status == Status.FINISHED

    def close(self) -> None:
        """Tell the SuperLink that this client leaves."""
        self._over.set()
        if self.node_id:
            with suppress(LostError, RefusedError, RunOverError):
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id))
                if self._place.key is None:
                    self._call(self._client.UnregisterNode, UnregisterNodeFleetRequest(node_id=self.node_id))
        self._client.close()

    def _call(self, method: Callable[[_Request], _Answer], request: _Request) -> _Answer:
        """Make a request; whatever goes wrong with it is one of our errors."""
        try:
            return method(request)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise refusal(error, self._place.address, self._place.authority is not None) from error
        except SystemExit as leaving:  # So Flower ends a process whose version the server does not accept.
            raise RefusedError(
                f"the server at {self._place.address} wants another version of Flower ({leaving.code}); install the "
                "version that the server has"
            ) from leaving

    def _beat(self) -> None:
        """Show that this client is alive, also while it trains."""
        while not self._over.wait(_SECONDS_BETWEEN_HEARTBEATS):
            node = self._node
            if node.node_id:
                with suppress(LostError, RefusedError, RunOverError):
                    request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
                    self._call(self._client.SendNodeHeartbeat, request)
