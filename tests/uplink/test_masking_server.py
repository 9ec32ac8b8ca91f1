import itertools

import numpy as np
import pytest

from flexlora.uplink.masking_server import MaskedSumError, MaskingServer, MaskingTerms, neighbours_of

SESSION = bytes(16)


@pytest.mark.parametrize(
    ("threshold", "size", "needed"), [(2 / 3, 9, 6), (2 / 3, 10, 7), (0.51, 32, 17), (0.51, 3, 2), (1.0, 5, 5)]
)
def test_a_threshold_is_that_share_and_more_than_half(threshold, size, needed):
    assert MaskingTerms(threshold=threshold).needed_of(size, size) == needed


@pytest.mark.parametrize(("size", "num_neighbours"), [(7, 2), (9, 4), (11, 4), (10, 6)])
@pytest.mark.parametrize("threshold", [0.51, 2 / 3])
def test_no_dropouts_that_are_allowed_cut_the_ring_in_two(size, num_neighbours, threshold):
    order = {f"c{place:02}": place for place in range(size)}
    graph = {one: set(neighbours_of(order, one, num_neighbours)) for one in order}
    needed = MaskingTerms(threshold=threshold).needed_of(num_neighbours + 1, size)
    num_allowed = 0
    for alive in (set(found) for number in range(1, size + 1) for found in itertools.combinations(order, number)):
        if all(len(graph[one] & alive) >= needed for one in alive):
            reached = {min(alive)}
            for _ in alive:
                reached |= {other for one in reached for other in graph[one] & alive}
            assert reached == alive
            num_allowed += 1
    assert num_allowed >= 1


@pytest.mark.parametrize(("size", "num_neighbours"), [(9, 4), (10, 6), (33, 8)])
def test_neighbours_are_mutual_as_many_as_asked_for_and_lead_everywhere(size, num_neighbours):
    order = {f"c{place:02}": place for place in np.random.default_rng(0).permutation(size).tolist()}
    graph = {one: neighbours_of(order, one, num_neighbours) for one in order}
    for one, others in graph.items():
        assert one in others and len(others) == num_neighbours + 1 and others == sorted(others)
        assert all(one in graph[other] for other in others)
    reached = {"c00"}
    for _ in range(size):
        reached |= {other for one in reached for other in graph[one]}
    assert reached == set(order)


def test_with_few_clients_or_no_bound_everybody_is_a_neighbour():
    order = {"a": 0, "b": 1, "c": 2, "d": 3}
    assert neighbours_of(order, "b", None) == neighbours_of(order, "b", 4) == ["a", "b", "c", "d"]


def test_no_sum_is_taken_of_fewer_than_three():
    with pytest.raises(MaskedSumError, match="at least 3 clients that trained; got 2"):
        MaskingServer(["a", "b"], MaskingTerms(), SESSION, np.random.default_rng(0))
    server = MaskingServer(["a", "b", "c"], MaskingTerms(), SESSION, np.random.default_rng(0))
    with pytest.raises(MaskedSumError, match="only 0 gave keys"):
        server.take_keys({})


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"seal": 1, "masks": "00"},
        {"seal": "00" * 32, "masks": ["00"]},
        {"seal": "00" * 32, "masks": "02" * 32},
        {"seal": "01" * 32, "masks": "00" * 32},
    ],
)
def test_keys_that_are_none_put_their_client_out(reply):
    good = {"seal": "01" * 32, "masks": "02" * 32}
    server = MaskingServer(["a", "b", "c", "d"], MaskingTerms(), SESSION, np.random.default_rng(0))
    failures = server.take_keys({"a": good, "b": reply, "c": good, "d": good})
    assert failures.keys() == {"b"} and server.alive == ["a", "c", "d"]
