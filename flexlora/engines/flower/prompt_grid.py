"""A Grid that takes replies as soon as their content is at the SuperLink."""

from collections.abc import Callable, Iterable

from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.superlink.grid import HttpGrid

from flexlora.engines.flower.transfers import whole_message


class PromptGrid(HttpGrid):
    """Flower's own Grid, which waits a second for a reply that is announced and not yet there, without that second.

    Attributes:
        name_of_key: Node id -> the name under which the key of its client is registered; None without keys.
    """

    name_of_key: Callable[[int], str | None] | None = None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to some messages that are there; one whose content is lost is an error in its place."""
        client, run_id = self._runtime_client, self.run.run_id
        answer = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        pull = make_pull_object_fn_protobuf(client.PullObject, self.node, run_id)

        def confirm(message_id: str) -> None:
            """Let the SuperLink drop a message."""
            request = ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=message_id)
            client.ConfirmMessageReceived(request)

        replies = []
        for announced, tree in zip(answer.messages_list, answer.message_object_trees, strict=True):
            try:
                replies.append(whole_message(announced, tree, pull, confirm))
            except ObjectPullError as error:
                replies.append(self._lost(announced.metadata.reply_to_message_id, run_id, str(error)))
        return replies

    def _lost(self, answered: str, run_id: int, reason: str) -> Message:
        """Return the error that stands for a reply to the message ``answered`` that did not arrive."""
        own = self.node.node_id
        metadata = Metadata(
            run_id=run_id,
            message_id="",
            src_node_id=own,
            dst_node_id=own,
            reply_to_message_id=answered,
            group_id="",
            created_at=now().timestamp(),
            ttl=0,
            message_type=SYSTEM_MESSAGE_TYPE,
        )
        return make_message(metadata=metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, reason))
