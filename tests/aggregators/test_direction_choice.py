from collections import Counter
from itertools import combinations

import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.direction_choice import chosen_directions, seed_of, sender_of
from flexlora.federation.messages import Update
from flexlora.lora.factors import LoraFactors


def adapter(seed: int, B_value: float = 0.0) -> dict[str, LoraFactors]:
    A = torch.rand(3, 5, generator=torch.Generator().manual_seed(seed))
    return {"m": LoraFactors(A, torch.full((4, 3), B_value), 2.0)}


def test_the_seed_depends_on_the_initial_rows_alone():
    assert seed_of(adapter(0)) == seed_of(adapter(0, B_value=1.0)) != seed_of(adapter(1))
    assert 0 <= seed_of(adapter(0)) < 2**63


def test_a_choice_is_ascending_without_repeats_and_the_same_when_asked_again():
    for rank in range(1, 9):
        chosen = chosen_directions(7, 3, "c", "m", 8, rank)
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == rank and 0 <= chosen[0] and chosen[-1] < 8
        assert torch.equal(chosen, chosen_directions(7, 3, "c", "m", 8, rank))


def test_seeds_rounds_clients_and_modules_choose_differently():
    one = {"seed": 7, "server_round": 3, "client_id": "c", "module": "m"}
    others = [one | other for other in ({"seed": 8}, {"server_round": 4}, {"client_id": "d"}, {"module": "n"})]
    first = chosen_directions(**one, server_rank=64, rank=32).tolist()
    assert all(chosen_directions(**other, server_rank=64, rank=32).tolist() != first for other in others)


def test_every_set_of_directions_is_as_likely_as_any_other():
    draws = 3000
    counts = Counter(tuple(chosen_directions(0, t, "c", "m", 4, 2).tolist()) for t in range(draws))
    assert counts.keys() == set(combinations(range(4), 2))
    # Chi-square with 5 degrees of freedom: above 20.5 with a chance of 0.001.
    assert sum((count - draws / 6) ** 2 / (draws / 6) for count in counts.values()) < 20.5


def test_a_sum_of_several_clients_has_no_sender():
    assert sender_of(Update("a", {}, 1.0)) == "a"
    with pytest.raises(AggregationError, match="which client sent an update"):
        sender_of(Update(None, {}, 1.0))
