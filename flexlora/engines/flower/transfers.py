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
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects

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
        ObjectPullError: If an object does not arrive at the SuperLink in time, or is not what Flower writes; a message
            of which that is known is confirmed, so that it does not come again.
    """
    own = message_from_proto(announced).metadata
    message_id = own.message_id
    ids = [one.object_id for one in iterate_object_tree(tree)]
    contents = pull_objects(
        ids, pull, initial_backoff=_FIRST_PAUSE, backoff_cap=_LONGEST_PAUSE, max_tries_per_object=_MOST_TRIES
    )
    confirm(message_id)
    try:
        whole = inflate_object_from_contents(message_id, contents)
    except Exception as error:  # Whatever bytes of somebody else make Flower raise; the SuperLink looks at heads alone.
        raise ObjectPullError(message_id, f"its content cannot be read ({type(error).__name__})") from error
    # What is announced has been checked by the SuperLink, what is in the content by nobody.
    if not isinstance(whole, Message) or whole.metadata.reply_to_message_id != own.reply_to_message_id:
        raise ObjectPullError(message_id, "its content is another message than the one announced")
    whole.metadata.__dict__["_message_id"] = message_id
    return whole
