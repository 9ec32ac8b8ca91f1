import dataclasses

import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.training.group_room import MOST_CLIENTS, has_room
from flexlora.training.length_runs import LARGER
from flexlora.training.one_client import LocalTraining

CPU = torch.device("cpu")
SETTINGS = LocalTraining(batch_size=2)


def test_one_client_always_has_room(jobs):
    assert has_room([], jobs[0], SETTINGS, CPU, None)
    assert has_room([], jobs[0], LocalTraining(batch_size=10**6), CPU, None)


@pytest.mark.parametrize("most", [1, 3])
def test_a_number_that_was_set_decides_alone(jobs, most):
    assert has_room(jobs[: most - 1], jobs[5], SETTINGS, CPU, most)
    assert not has_room(jobs[:most], jobs[5], SETTINGS, CPU, most)


def test_without_a_number_tokens_and_the_largest_group_decide(jobs):
    tiny = dataclasses.replace(jobs[1], examples=jobs[1].examples[:1])
    assert has_room([tiny], tiny, SETTINGS, CPU, None)
    tokens = len(tiny.examples[0].input_ids)
    assert has_room([tiny] * (4096 // tokens - 1), tiny, SETTINGS, CPU, None) == (4096 // tokens <= MOST_CLIENTS)
    assert not has_room([tiny] * (4096 // tokens + 1), tiny, SETTINGS, CPU, None)
    assert not has_room([tiny] * MOST_CLIENTS, tiny, SETTINGS, CPU, None)


def test_a_larger_base_has_fewer_clients_at_once(jobs):
    sized = dataclasses.replace(jobs[1], examples=[EncodedExample((1,) * 60, (1,) * 60)] * 2)
    # Two examples a step: 120 tokens of a client.
    assert [has_room([sized] * number, sized, SETTINGS, CPU, None, LARGER) for number in (1, 3, 4)] == [
        True,
        True,
        False,
    ]
    assert has_room([sized] * 4, sized, SETTINGS, CPU, None, "cpu")
