"""Takes whole messages from a SuperLink, at either end.

A message is announced before its content has arrived at the SuperLink. Flower then tries again after a second, which is
longer than a round of a small model takes; here it is tried again at once, and ever less often.
"""

from collections.abc import Callable

from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
_MOST_TRIES = 200


def whole_message(
    announced: MessageProto, tree: ObjectTree, pull: Callable[[str], bytes], confirm: Callable[[str], None]
) -> Message:
    """Return a message with its content, and confirm that it is here.

    Args:
        announced: The message without content.
        tree: Ids of the objects that the content consists of.
        pull: Object id to object.
        confirm: Told the id of the message.

    Raises:
        ObjectPullError: If an object does not arrive at the SuperLink in time.
    """
    message_id = message_from_proto(announced).metadata.message_id
    ids = [one.object_id for one in iterate_object_tree(tree)]
    contents = pull_objects(
        ids, pull, initial_backoff=_FIRST_PAUSE, backoff_cap=_LONGEST_PAUSE, max_tries_per_object=_MOST_TRIES
    )
    confirm(message_id)
    whole = inflate_object_from_contents(message_id, contents)
    assert isinstance(whole, Message)
    whole.metadata.__dict__["_message_id"] = message_id
    return whole
