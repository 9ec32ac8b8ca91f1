import dataclasses

import pytest
import torch

from flexlora.data.prompts import EncodedExample
from flexlora.training.group_passes import PassRow, _cut_into_segments, cut_into_passes
from flexlora.training.length_runs import LARGER


def test_rows_of_similar_length_share_a_pass_whoever_they_belong_to():
    @dataclasses.dataclass(eq=False)
    class Client:
        bank_numbers: tuple
        slots: tuple

    clients = [Client((0,), (0,)), Client((0,), (1,)), Client((1,), (0,))]
    lengths = {0: (10, 300, 12), 1: (290, 11, 310), 2: (11, 305)}
    rows = [
        PassRow(member, clients[member], EncodedExample((1,) * length, (1,) * length), 1.0, (0, 0, 0))
        for member, own in lengths.items()
        for length in own
    ]
    passes = [sorted((row.pool_index, row.length) for row in part) for part in cut_into_passes(rows, "cpu", 1024)]
    assert [(0, 10), (0, 12), (1, 11)] in [[pair for pair in part if pair[0] < 2] for part in passes]
    assert sum(map(len, passes)) == 8
    assert all(max(part, key=lambda pair: pair[1])[1] * len(part) <= 1024 for part in passes)
    of_larger = cut_into_passes(rows, LARGER, 512)
    assert all(max(row.length for row in part) * len(part) <= 512 for part in of_larger)


@pytest.mark.parametrize(
    ("slots", "firsts"),
    [([2, 2, 3, 3], slice(2, 4)), ([0, 0, 0, 0, 3, 3], [0, 0, 3]), ([1], slice(1, 2)), ([0, 2, 2, 2], [0, 2, 2, 2])],
)
def test_segments_are_as_long_as_the_rows_of_clients_allow(slots, firsts):
    places, num_segments = _cut_into_segments(slots, torch.device("cpu"))
    if isinstance(firsts, slice):
        assert places == firsts
    else:
        assert places.tolist() == firsts
    assert num_segments == (firsts.stop - firsts.start if isinstance(firsts, slice) else len(firsts))
