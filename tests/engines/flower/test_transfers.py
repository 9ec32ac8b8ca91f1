"""Messages as a SuperLink hands them over, whole and with content that its sender made up."""

from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from flexlora.engines.flower.transfers import whole_message


def taken(
    change: Callable[[bytes], bytes] = lambda content: content, other: str | None = None
) -> tuple[Message, list[str]]:
    """Take a message with a changed content, or announced as a reply to ``other``; tell what was confirmed."""
    message = Message(RecordDict({"flexlora": ConfigRecord({"header": b"{}"})}), 5, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    objects[message.object_id] = change(objects[message.object_id])
    announced = message_to_proto(remove_content_from_message(message))
    if other is not None:
        announced.metadata.reply_to_message_id = other
    confirmed: list[str] = []
    return whole_message(announced, get_object_tree(message), objects.__getitem__, confirmed.append), confirmed


def test_a_message_comes_whole_and_is_confirmed() -> None:
    message, confirmed = taken()
    assert message.content.config_records["flexlora"]["header"] == b"{}"
    assert confirmed == [message.metadata.message_id]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content.replace(b"Message", b"Array", 1),
        lambda content: content.replace(b"Message", b"Nothing", 1),
        lambda content: content[:-20] + b"\xff" * 20,
    ],
)
def test_content_that_is_no_message_is_told_as_lost(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ObjectPullError, match="its content"):
        taken(change)


def test_a_reply_to_another_message_than_announced_is_told_as_lost() -> None:
    with pytest.raises(ObjectPullError, match="another message than the one announced"):
        taken(other="a" * 64)
