"""What travels each round, counted on the wire; expected numbers are the formulas of each method's paper.

For one module ``[d_out, d_in]`` and a client of rank ``r``, beside names and shapes.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest

from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, SHAPES, Case
from flexlora.aggregators.registry import AGGREGATORS
from flexlora.federation.messages import Update
from flexlora.uplink.blob import unpack
from flexlora.uplink.wire import encode_broadcast, encode_update

Formula = Callable[[int, int, int], int]  # rank, d_out, d_in -> numbers


def both(r: int, d_out: int, d_in: int) -> int:
    return r * (d_out + d_in)


def only_A(r: int, d_out: int, d_in: int) -> int:
    return r * d_in


def only_B(r: int, d_out: int, d_in: int) -> int:
    return r * d_out


DOWN_AND_UP: dict[str, tuple[Formula, Formula]] = {
    "dimension_wise": (both, both),
    "fedavg": (both, both),
    "fedit": (both, both),
    "fedsa_lora": (both, only_A),
    "ffa_lora": (only_B, only_B),
    "het_lora": (both, both),
    "lora_fair": (both, both),
    "rolora": (both, only_B),  # A in even rounds, see below
    "zero_pad": (both, both),
}


def traffic(case: Case, state: object, rank: int) -> tuple[int, int]:
    """Return how many numbers a client of this rank receives and sends."""
    sent = case.aggregator.broadcast(state, dict.fromkeys(SHAPES, rank))
    update = Update("a", sent.trainable, 1.0)
    return tuple(
        sum(tensor.numel() for tensor in unpack(data).tensors.values())
        for data in (encode_broadcast(sent, "float32"), encode_update(update, sent, "float32"))
    )  # type: ignore[return-value]


def summed(formula: Formula, rank: int) -> int:
    return sum(formula(rank, *shape) for shape in SHAPES.values())


@pytest.mark.parametrize("name", DOWN_AND_UP)
def test_what_travels_is_what_the_method_is_said_to_send(name: str) -> None:
    case = Case(AGGREGATORS[name], {}, SCALINGS[0])
    down, up = DOWN_AND_UP[name]
    for rank in [SERVER_RANK] if case.traits.needs_one_rank else range(1, SERVER_RANK + 1):
        assert traffic(case, case.start(), rank) == (summed(down, rank), summed(up, rank))


def test_rolora_sends_a_in_every_second_round() -> None:
    case = Case(AGGREGATORS["rolora"], {}, SCALINGS[0])
    assert traffic(case, case.after_a_round(), 3) == (summed(both, 3), summed(only_A, 3))


def test_a_pruned_client_of_het_lora_receives_and_sends_less() -> None:
    case = Case(AGGREGATORS["het_lora"], {"gamma": 0.5}, SCALINGS[0])
    state = replace(case.after_a_round(), num_prunings={"a": 1})
    sent = case.aggregator.broadcast_to(state, dict.fromkeys(SHAPES, 4), "a")
    assert {factors.rank for factors in sent.trainable.values()} == {2}
    numbers = sum(tensor.numel() for tensor in unpack(encode_broadcast(sent, "float32")).tensors.values())
    assert numbers == summed(both, 2)
