"""Counts that no machine could hold or finish are refused with the largest that is sensible."""

import pytest

from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import parse_config


@pytest.mark.parametrize(
    "key",
    [
        "rounds.num_rounds",
        "rounds.cohort_size",
        "data.num_clients",
        "data.examples_per_task",
        "data.clients_per_task",
        "data.num_unseen_tasks",
        "data.max_length",
        "model.num_threads",
        "model.num_processes",
        "training.batch_size",
        "training.num_epochs",
        "training.gradient_accumulation_steps",
        "evaluation.max_new_tokens",
        "evaluation.local_only_epochs",
        "devices.max_rank",
        "rounds.keep_checkpoints",
    ],
)
def test_a_count_of_a_hundred_billion_is_refused_with_the_largest(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=rf"{key}: must be at most [\d\u202f]+, .*; got 1e\+11"):
        parse_config({section: {name: 10**11} | ({"name": "generated"} if section == "data" else {})}, "test")


def test_ranks_and_counts_by_name_are_bounded_too() -> None:
    trees = (
        {"clients": {"types": {"a": {"attention": 10**11, "ffn": 2}}}},
        {"clients": {"types": {"a": {"attention": 1, "ffn": 2, "patterns": {"x.y": 10**11}}}}},
        {"clients": {"counts": {"type1": 10**11}}},
        {"devices": {"profiles": "built_in", "rank_choices": [8, 10**11]}},
    )
    for tree in trees:
        with pytest.raises(ConfigError, match=r"must be at most [\d\u202f]+, .*; got 1e\+11"):
            parse_config(tree, "test")


def test_seeds_are_no_counts_and_what_runs_use_is_allowed() -> None:
    parse_config({"seed": 10**11, "data": {"name": "generated", "corpus_seed": 10**11}}, "test")
    data = {"name": "generated", "num_clients": 10_000, "max_length": 131_072}
    parse_config({"rounds": {"num_rounds": 100_000}, "data": data}, "test")
