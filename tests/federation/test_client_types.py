"""Rank plans of client types, and which client gets which."""

import numpy as np
import pytest
from scipy import stats

from flexlora.federation.client_types import (
    DISTRIBUTIONS,
    assign_plans,
    deal_plans,
    fixed_plans,
    four_types,
    rank_plans,
    type_plan,
)
from flexlora.federation.clients import ClientError, compact_ranks, count_plans

LLAMA = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def test_the_four_types_of_the_paper_have_its_ranks_in_attention_and_ffn():
    # Paper, table 1: 8 / 8, 30 / 30, 30 / 200, 200 / 200.
    expected = {"type1": (8, 8), "type2": (30, 30), "type3": (30, 200), "type4": (200, 200)}
    plans = rank_plans("paper")
    assert list(plans) == list(expected)
    for name, (attention, ffn) in expected.items():
        ranks = plans[name].resolve(LLAMA)
        assert set(ranks) == set(LLAMA)
        assert all(rank == (attention if "self_attn" in module else ffn) for module, rank in ranks.items())


def test_the_types_for_small_models_keep_the_shape_of_the_papers():
    ranks = {name: compact_ranks(plan.resolve(LLAMA)) for name, plan in rank_plans("small").items()}
    assert [(r["q_proj"], r["up_proj"]) for r in ranks.values()] == [(1, 1), (4, 4), (4, 16), (16, 16)]


@pytest.mark.parametrize(
    ("module", "is_attention"),
    [
        ("model.layers.3.self_attn.o_proj", True),
        ("transformer.h.0.attn.c_attn", True),
        ("transformer.h.0.attn.c_proj", True),
        ("transformer.h.0.mlp.c_proj", False),
        ("gpt_neox.layers.1.attention.query_key_value", True),
        ("gpt_neox.layers.1.attention.dense", True),
        ("gpt_neox.layers.1.mlp.dense_h_to_4h", False),
        ("transformer.blocks.0.attn.Wqkv", True),
        ("transformer.blocks.0.ffn.up_proj", False),
        ("model.decoder.layers.0.self_attn.out_proj", True),
        ("model.decoder.layers.0.fc1", False),
        ("model.layers.0.block_sparse_moe.experts.0.w1", False),
        ("encoder.block.0.layer.0.SelfAttention.q", True),
        ("encoder.block.0.layer.1.DenseReluDense.wi", False),
    ],
)
def test_attention_is_told_from_ffn_by_the_names_of_many_architectures(module, is_attention):
    assert type_plan("t", attention=3, ffn=5).resolve([module]) == {module: 3 if is_attention else 5}


def test_a_rank_of_zero_leaves_a_part_without_adapter():
    assert all("self_attn" in module for module in type_plan("attention only", 4, 0).resolve(LLAMA))


def test_patterns_come_before_attention_and_ffn():
    plan = rank_plans({"edge": {"attention": 2, "ffn": 3, "patterns": {r"layers\.0\..*q_proj": 7}}})["edge"]
    ranks = plan.resolve(LLAMA)
    assert ranks["model.layers.0.self_attn.q_proj"] == 7
    assert ranks["model.layers.1.self_attn.q_proj"] == 2
    assert ranks["model.layers.0.mlp.up_proj"] == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: four_types(8, 4, 16), "1 <= smallest <= middle <= largest; got 8, 4, 16"),
        (lambda: four_types(0, 4, 16), "got 0, 4, 16"),
        (lambda: type_plan("edge", -1, 2), "clients.types.edge: ranks must be 0 .no adapter. or more; got -1"),
        (lambda: type_plan("edge", 0, 0), "clients.types.edge must adapt something"),
        (lambda: type_plan("edge", 1, 1, {"[": 2}), "clients.types.edge.patterns: '\\[' must be a regular expression"),
        (lambda: rank_plans("huge"), "clients.types must be paper, small or a mapping of types; got 'huge'"),
        (lambda: rank_plans({}), "at least one type"),
    ],
)
def test_impossible_types_are_refused(make, message):
    with pytest.raises(ClientError, match=message):
        make()


# Counts the paper's released code realises with 1,613 clients: 1285/80/75/173 (light) and 80/75/173/1285 (strong).
@pytest.mark.parametrize(
    ("name", "realised"), [("heavy_tail_light", (1285, 80, 75, 173)), ("heavy_tail_strong", (80, 75, 173, 1285))]
)
def test_heavy_tails_are_those_the_released_code_realises(name, realised):
    assert stats.chisquare(realised, np.array(DISTRIBUTIONS[name]) * 1613).pvalue > 1e-3


def test_normal_has_most_clients_in_the_middle_as_intended():
    # Density of N(1.5, 0.7) at 0, 1, 2, 3, normalised, is what the released code set out to compute.
    density = stats.norm(1.5, 0.7).pdf([0, 1, 2, 3])
    np.testing.assert_allclose(DISTRIBUTIONS["normal"], density / density.sum(), atol=2e-3)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_realised_counts_follow_the_distribution(name):
    ids = [f"task{number:04d}" for number in range(4000)]
    counts = count_plans(assign_plans(ids, rank_plans("paper"), name, seed=3).values())
    expected = {f"type{i}": share * 4000 for i, share in enumerate(DISTRIBUTIONS[name], start=1) if share}
    assert sum(DISTRIBUTIONS[name]) == pytest.approx(1)
    assert set(counts) == set(expected)
    assert stats.chisquare([counts[key] for key in expected], list(expected.values())).pvalue > 1e-3


def test_a_clients_type_depends_on_the_seed_and_its_id_alone():
    ids = [f"task{number}" for number in range(300)]
    plans = rank_plans("small")
    assigned = assign_plans(ids, plans, "uniform", seed=1)
    fewer = assign_plans(list(reversed(ids))[:100], plans, "uniform", seed=1)
    assert all(assigned[client_id] == plan for client_id, plan in fewer.items())
    assert assign_plans(ids, plans, "uniform", seed=2) != assigned


def test_an_explicit_distribution_takes_weights_in_any_unit_and_any_order():
    ids = [f"task{number}" for number in range(200)]
    plans = rank_plans("small")
    assigned = assign_plans(ids, plans, {"type4": 1, "type1": 3, "type2": 0}, seed=0)
    assert assigned == assign_plans(ids, plans, {"type1": 75.0, "type4": 25.0}, seed=0)
    assert set(count_plans(assigned.values())) == {"type1", "type4"}
    assert set(assign_plans(ids, plans, {"type3": 1}, seed=0).values()) == {plans["type3"]}


def test_exact_counts_are_met_whatever_the_order_of_clients():
    ids = [f"task{number}" for number in range(50)]
    plans = rank_plans("small")
    dealt = deal_plans(ids, plans, {"type1": 40, "type3": 9, "type4": 1}, seed=5)
    assert count_plans(dealt.values()) == {"type1": 40, "type3": 9, "type4": 1}
    assert deal_plans(ids[::-1], plans, {"type4": 1, "type3": 9, "type1": 40}, seed=5) == dealt
    assert deal_plans(ids, plans, {"type1": 40, "type3": 9, "type4": 1}, seed=6) != dealt


def test_clients_assigned_by_name_have_their_type_and_nobody_else():
    plans = rank_plans("small")
    assert fixed_plans(["a", "b", "c"], plans, {"c": "type4", "a": "type1"}) == {
        "a": plans["type1"],
        "c": plans["type4"],
    }
    assert fixed_plans(["a"], plans, {}) == {}


def test_assigned_clients_and_types_that_do_not_exist_are_named_in_one_message():
    ids, plans = [f"task{number:02d}" for number in range(40)], rank_plans("small")
    with pytest.raises(
        ClientError, match=r"clients.assigned must name clients of the data; 2 of 3 are unknown"
    ) as raised:
        fixed_plans(ids, plans, {"task01": "type1", "task1": "type1", "taks02": "type2"})
    assert "'taks02', 'task1'. The data has 40: 'task00', 'task01', 'task02', 'task03', 'task04', ..." in str(
        raised.value
    )
    with pytest.raises(ClientError, match=r"clients.assigned must name types in type1, .*; got phone, tablet"):
        fixed_plans(ids, plans, {"task01": "phone", "task02": "tablet", "task03": "type1"})


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ("bell", "clients.distribution must be one of uniform, heavy_tail_light"),
        ({"type9": 1.0}, "must name types in type1, type2, type3, type4; got type9"),
        ({"type1": 0.0}, "must be 0 or more and not all 0"),
        ({"type1": -1.0, "type2": 2.0}, "must be 0 or more"),
        ({"type1": float("nan")}, "must be 0 or more"),
        ({}, "not all 0"),
    ],
)
def test_what_is_no_distribution_over_the_types_is_refused(distribution, message):
    with pytest.raises(ClientError, match=message):
        assign_plans(["a"], rank_plans("small"), distribution, seed=0)


def test_named_distributions_need_four_types_and_counts_must_add_up():
    with pytest.raises(ClientError, match=r"clients.distribution=uniform is defined for 4 types; got 1"):
        assign_plans(["a"], {"edge": type_plan("edge", 1, 1)}, "uniform", seed=0)
    with pytest.raises(ClientError, match=r"clients.counts must add up to 2, .*; got 3: take away 1, or leave"):
        deal_plans(["a", "b"], rank_plans("small"), {"type1": 3}, seed=0)
    with pytest.raises(ClientError, match=r"clients.counts must add up to 2, .*; got 0: add 2"):
        deal_plans(["a", "b"], rank_plans("small"), {}, seed=0)
    with pytest.raises(ClientError, match=r"clients.counts must be 0 or more; got {'type1': 3, 'type2': -1}"):
        deal_plans(["a", "b"], rank_plans("small"), {"type1": 3, "type2": -1}, seed=0)
    with pytest.raises(ClientError, match=r"clients.counts must name types in type1, .*; got phone"):
        deal_plans(["a"], rank_plans("small"), {"phone": 1}, seed=0)
    with pytest.raises(ClientError, match="client ids must be unique; 'a' occurs 2 times"):
        assign_plans(["a", "b", "a"], rank_plans("small"), "uniform", seed=0)
