"""Messages are values: they cannot be changed, they say what they leave open, and they cross processes."""

import dataclasses
import pickle

import pytest
import torch

from flexlora.federation.messages import Broadcast, Change, ClientFailure, Update
from flexlora.lora.factors import LoraFactors

ADAPTER = {"layer": LoraFactors(torch.ones(2, 3), torch.zeros(4, 2), 8.0)}
MESSAGES = [
    Broadcast(ADAPTER, ADAPTER, "B"),
    Update("ann", ADAPTER, 3.0, {"loss": 0.5, "steps": 2.0}, 10, 20, 0.1),
    Change(Update("ann", ADAPTER, 3.0), ADAPTER, 0.5),
    ClientFailure("ann", "train", "out of memory", 20, 0),
]


def test_a_broadcast_trains_both_factors_and_adds_nothing_unless_it_says_so():
    broadcast = Broadcast(ADAPTER)
    assert (broadcast.frozen, broadcast.train_factors) == (None, "both")


def test_an_update_and_a_failure_carry_no_bytes_and_a_change_no_discount_unless_they_say_so():
    update, failure = Update(None, ADAPTER, 1.0), ClientFailure("ann", "broadcast", "gone")
    assert (update.up_bytes, update.down_bytes, update.train_seconds, update.metrics) == (0, 0, 0.0, {})
    assert (failure.up_bytes, failure.down_bytes) == (0, 0)
    assert Change(update, ADAPTER).discount == 1.0


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_cannot_be_changed(message):
    for field in dataclasses.fields(message):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, field.name, None)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_can_be_handed_to_another_process(message):
    again = pickle.loads(pickle.dumps(message))
    assert repr(again) == repr(message)
