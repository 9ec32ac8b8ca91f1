import random

import numpy as np
import torch

from flexlora.training.randomness import all_seeded, torch_seeded

CPU = torch.device("cpu")


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_block_has_a_stream_of_its_own_and_the_global_ones_go_on_after_it():
    with all_seeded(0, CPU):
        expected = [draws(), draws()]
    with all_seeded(0, CPU):
        first = draws()
        with all_seeded(2**40, CPU):
            inner = draws()
        with all_seeded(2**40, CPU):
            again = draws()
        assert [first, draws()] == expected
    assert inner == again != first


def test_global_generators_are_restored_after_an_error():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    try:
        with all_seeded(3, CPU):
            draws()
            raise RuntimeError
    except RuntimeError:
        pass
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_torch_alone_is_seeded_where_nothing_else_draws():
    with torch_seeded(7, CPU):
        numbers = torch.rand(4)
    assert torch.equal(numbers, torch.rand(4, generator=torch.Generator().manual_seed(7)))
