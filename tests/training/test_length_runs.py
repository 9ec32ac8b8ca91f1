import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora.training.length_runs import LARGER, PASS_TOKENS, cheapest_runs, pace_of


def cost_of(lengths, runs, pass_tokens):
    return sum(pass_tokens + len(lengths[run]) * max(lengths[run]) for run in runs)


def every_cut(number):
    """All ways of cutting so many neighbours into runs."""
    for chosen in itertools.product([False, True], repeat=number - 1):
        bounds = [0, *(place for place, cut in enumerate(chosen, 1) if cut), number]
        yield [slice(start, end) for start, end in itertools.pairwise(bounds)]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    most=st.integers(1, 8),
    pass_tokens=st.integers(0, 60),
)
def test_no_other_cut_is_cheaper(lengths, most, pass_tokens):
    runs = cheapest_runs(lengths, most, pass_tokens)
    assert [place for run in runs for place in range(len(lengths))[run]] == list(range(len(lengths)))
    allowed = [cut for cut in every_cut(len(lengths)) if all(run.stop - run.start <= most for run in cut)]
    assert runs in allowed
    assert cost_of(lengths, runs, pass_tokens) == min(cost_of(lengths, cut, pass_tokens) for cut in allowed)


@pytest.mark.parametrize(("pass_tokens", "number"), [(0, 3), (1000, 1)])
def test_a_dear_pass_is_shared(pass_tokens, number):
    assert len(cheapest_runs([30, 20, 20, 5], 4, pass_tokens)) == number


def test_nothing_needs_no_pass():
    assert cheapest_runs([], 4, 96) == []


@pytest.mark.parametrize(
    ("device", "parameters", "pace"),
    [("cpu", 1_400_000, "cpu"), ("cpu", 135_000_000, LARGER), ("cuda", 135_000_000, "cuda"), ("cuda", 1, "cuda")],
)
def test_size_counts_on_a_cpu_only_and_every_table_knows_the_pace(device, parameters, pace):
    assert pace_of(device, parameters) == pace
    assert pace in PASS_TOKENS
