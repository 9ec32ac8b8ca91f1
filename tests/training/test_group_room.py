import dataclasses

import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.training import group_room
from flexlora.training.common_ranks import CommonRanks
from flexlora.training.group_room import MOST_CLIENTS, has_room, tokens_with_memory
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


def test_factors_take_the_memory_of_the_ranks_that_they_are_stored_at(jobs, monkeypatch):
    tiny = dataclasses.replace(jobs[1], examples=jobs[1].examples[:1])
    padded = CommonRanks(64)
    numbers = sum(64 * sum(factors.shape) for factors in tiny.broadcast.trainable.values())
    # Two moments, and weights and gradients of twice as many slots, in float32; a quarter of the memory is for them.
    monkeypatch.setattr(group_room, "memory_bytes", lambda: 4 * 3 * 24 * numbers)
    monkeypatch.setattr(group_room, "num_cores", lambda: 1)
    assert [has_room([tiny] * number, tiny, SETTINGS, CPU, None, None, padded) for number in (2, 3)] == [True, False]
    assert has_room([tiny] * 3, tiny, SETTINGS, CPU, None)


def test_on_a_gpu_a_pass_has_as_many_tokens_as_there_is_memory_for(model, monkeypatch):
    assert tokens_with_memory(model) == 1024

    class OnGpu:
        device, pace = torch.device("cuda"), "cuda"
        network, num_parameters = model.network, model.num_parameters

    def most(num_bytes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, num_bytes))
        return tokens_with_memory(OnGpu())

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    assert most(10**15) == 32768
    assert most(1) == 1
    # The more memory, the more tokens: what is left beside the base is divided by what a token needs.
    base = 2 * 4 * model.num_parameters
    assert most(base + 2 * 10**8) == pytest.approx(2 * most(base + 10**8), rel=0.01)
