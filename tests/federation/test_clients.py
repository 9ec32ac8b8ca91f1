"""Rank plans, what they have in common, and the cohorts of rounds."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flexlora.federation.clients import (
    ClientError,
    ClientSpec,
    RankPlan,
    compact_ranks,
    count_plans,
    largest_ranks,
    sample_cohort,
    sample_poisson,
    smallest_ranks,
    unique_ids,
)

SHAPES = {"0.q_proj": (8, 8), "0.up_proj": (24, 8), "1.q_proj": (8, 8)}


def clients(num: int) -> list[ClientSpec]:
    plan = RankPlan("small", ((r"", 2),))
    return [ClientSpec(f"client{number}", plan, 10) for number in range(num)]


@given(num=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 2**40), server_round=st.integers(1, 99))
def test_a_cohort_is_drawn_without_replacement_and_sorted(num, size, seed, server_round):
    cohort = sample_cohort(clients(num), size, seed, server_round)
    ids = [client.client_id for client in cohort]
    assert len(ids) == min(num, size) == len(set(ids))
    assert ids == sorted(ids)


def test_a_cohort_is_a_function_of_seed_round_and_the_set_of_clients():
    everyone = clients(100)
    cohort = sample_cohort(everyone, 10, seed=4, server_round=7)
    assert sample_cohort(everyone[::-1], 10, seed=4, server_round=7) == cohort
    assert sample_cohort(everyone, 10, seed=4, server_round=8) != cohort
    assert sample_cohort(everyone, 10, seed=5, server_round=7) != cohort


def test_every_client_is_as_likely_as_any_other():
    everyone = clients(20)
    drawn = [c.client_id for r in range(1, 1001) for c in sample_cohort(everyone, 5, seed=0, server_round=r)]
    counts = [drawn.count(client.client_id) for client in everyone]
    # Draws without replacement vary less than independent ones, so the statistic can only be too small.
    assert stats.chisquare(counts).pvalue > 1e-3


def test_cohorts_that_cannot_be_drawn_are_refused():
    with pytest.raises(ClientError, match=r"rounds.cohort_size must be 1 or more; got 0"):
        sample_cohort(clients(3), 0, seed=0, server_round=1)
    with pytest.raises(ClientError, match="at least one client; got none"):
        sample_cohort([], 1, seed=0, server_round=1)
    with pytest.raises(ClientError, match="client ids must be unique"):
        sample_cohort(clients(2) + clients(1), 1, seed=0, server_round=1)


def test_equal_layers_are_folded_and_unequal_ones_keep_their_paths():
    assert compact_ranks({"l.0.q_proj": 8, "l.1.q_proj": 8, "l.0.up_proj": 8, "l.1.up_proj": 16}) == {
        "q_proj": 8,
        "l.0.up_proj": 8,
        "l.1.up_proj": 16,
    }
    assert compact_ranks({"h.0.attn.c_proj": 4, "h.0.mlp.c_proj": 16}) == {"h.0.attn.c_proj": 4, "h.0.mlp.c_proj": 16}
    assert compact_ranks({"lm_head": 2}) == {"lm_head": 2}
    assert compact_ranks({}) == {}


def test_a_module_no_pattern_matches_is_left_out():
    assert RankPlan("q only", ((r"q_proj$", 4),)).resolve(
        ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    ) == {"model.layers.0.self_attn.q_proj": 4}


def test_the_first_pattern_that_matches_decides_and_rank_zero_leaves_a_module_out():
    plan = RankPlan("mixed", ((r"0\.q", 3), (r"q_proj", 0), (r"", 5)))
    assert plan.resolve(reversed(SHAPES)) == {"0.q_proj": 3, "0.up_proj": 5}
    assert list(plan.resolve(reversed(SHAPES))) == ["0.q_proj", "0.up_proj"]


def test_plans_are_counted_by_name():
    one, other = RankPlan("b", ()), RankPlan("a", ())
    assert count_plans([one, other, one]) == {"a": 1, "b": 2}


def test_the_largest_ranks_cover_every_plan():
    plans = [RankPlan("q", ((r"q_proj", 4),)), RankPlan("all", ((r"1\.", 9), (r"", 2)))]
    assert largest_ranks(plans, SHAPES) == {"0.q_proj": 4, "0.up_proj": 2, "1.q_proj": 9}


def test_the_smallest_ranks_are_what_every_plan_can_afford():
    plans = [RankPlan("q", ((r"q_proj", 4),)), RankPlan("all", ((r"1\.", 9), (r"", 2)))]
    assert smallest_ranks(plans, SHAPES) == {"0.q_proj": 2, "1.q_proj": 4}


def test_where_plans_share_no_module_the_smallest_ranks_are_those_with_the_fewest_parameters():
    # Parameters: 2 * (16 + 16) = 64 of q; of up 3 * 32 = 96, then 1 * 32 = 32.
    q = RankPlan("q", ((r"q_proj", 2),))
    assert smallest_ranks([RankPlan("up", ((r"up_proj", 3),)), q], SHAPES) == {"0.q_proj": 2, "1.q_proj": 2}
    assert smallest_ranks([q, RankPlan("up", ((r"up_proj", 1),))], SHAPES) == {"0.up_proj": 1}


def test_ids_that_occur_twice_are_refused():
    assert unique_ids(iter("ba")) == ["b", "a"]
    with pytest.raises(ClientError, match="client ids must be unique; 'a' occurs 3 times"):
        unique_ids("abaca")


def test_poisson_sampling_draws_each_client_on_its_own_with_the_same_probability() -> None:
    everyone = clients(40)
    rounds = [sample_poisson(everyone, 10, seed=4, server_round=number) for number in range(1, 401)]
    assert sample_poisson(everyone[::-1], 10, seed=4, server_round=1) == rounds[0]
    sizes = [len(cohort) for cohort in rounds]
    # Binomial with 40 draws at 1/4: mean 10, variance 7.5; within five standard errors of 400 rounds.
    assert abs(sum(sizes) / 400 - 10) < 5 * (7.5 / 400) ** 0.5
    counts = Counter(client.client_id for cohort in rounds for client in cohort)
    assert len(counts) == 40 and all(abs(count - 100) < 5 * (400 * 3 / 16) ** 0.5 for count in counts.values())
    assert sample_poisson(everyone, 40, seed=4, server_round=1) == tuple(
        sorted(everyone, key=lambda one: one.client_id)
    )
    with pytest.raises(ClientError, match="at least one client"):
        sample_poisson([], 3, seed=0, server_round=1)
