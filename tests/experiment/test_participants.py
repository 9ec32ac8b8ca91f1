"""Who takes part in a run, with what data and which ranks."""

from pathlib import Path

import pytest

from flexlora.errors import FlexLoraError
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.participants import gather_participants
from flexlora.federation.clients import ClientError, count_plans


def config_of(**sections: object) -> Config:
    return parse_config(sections, "test")


def test_fedit_with_several_ranks_is_refused_before_any_model_is_loaded() -> None:
    data = {"name": "generated", "num_clients": 40, "examples_per_task": 10}
    with pytest.raises(ConfigError, match=r"method\.name=fedit needs one rank for all clients.*type1"):
        gather_participants(config_of(method={"name": "fedit"}, data=data, clients={"distribution": "uniform"}))
    one = gather_participants(config_of(method={"name": "fedit"}, data=data, clients={"distribution": {"type2": 1}}))
    assert set(one.plans) == {"type2"}


def test_counts_are_met_exactly_and_assigned_clients_keep_their_type() -> None:
    data = {"name": "generated", "num_clients": 40, "examples_per_task": 10}
    by_lot = gather_participants(config_of(data=data, clients={"distribution": "uniform"}))
    first, second = (client.client_id for client in by_lot.clients[:2])
    assigned = {first: "type4", second: "type1"}
    exact = gather_participants(
        config_of(data=data, clients={"counts": {"type1": 30, "type2": 8}, "assigned": assigned})
    )
    plan_of = {client.client_id: client.plan.name for client in exact.clients}
    assert count_plans(client.plan for client in exact.clients) == {"type1": 31, "type2": 8, "type4": 1}
    assert (plan_of[first], plan_of[second]) == ("type4", "type1")
    assert exact.in_words().startswith("40 clients (31 type1, 8 type2, 1 type4)")
    # Clients that are drawn from a distribution draw as they would if nobody were assigned.
    mixed = gather_participants(config_of(data=data, clients={"distribution": "uniform", "assigned": assigned}))
    assert [client.plan for client in mixed.clients[2:]] == [client.plan for client in by_lot.clients[2:]]
    assert [client.plan.name for client in mixed.clients[:2]] == ["type4", "type1"]


def test_counts_of_another_sum_and_unknown_clients_are_refused_before_any_model_is_loaded() -> None:
    data = {"name": "generated", "num_unseen_tasks": 9, "examples_per_task": 10}
    with pytest.raises(ClientError, match=r"clients.counts must add up to 2018, .*; got 30: add 1988"):
        gather_participants(config_of(data=data, clients={"counts": {"type1": 30}}))
    with pytest.raises(ClientError, match=r"1 of 1 are unknown: 'nobody'\. The data has 2018: '"):
        gather_participants(config_of(data=data, clients={"assigned": {"nobody": "type1"}}))


def test_unseen_tasks_are_no_clients_and_the_validation_set_comes_from_clients() -> None:
    data = {"name": "generated", "num_clients": 60, "examples_per_task": 12, "num_unseen_tasks": 9}
    participants = gather_participants(config_of(data=data))
    assert len(participants.clients) == 60 and len(participants.corpus.unseen) == 9
    assert not participants.corpus.unseen.keys() & participants.corpus.clients.keys()
    of_clients = {example for splits in participants.corpus.clients.values() for example in splits.validation}
    assert participants.validation and set(participants.validation) <= of_clients
    trained = {
        (example.instruction, example.input)
        for splits in participants.corpus.clients.values()
        for example in splits.train
    }
    scored = [example for splits in participants.corpus.unseen.values() for example in splits.test]
    assert not any((example.instruction, example.input) in trained for example in scored)


def test_several_clients_can_own_a_task_and_share_no_example_with_each_other_or_with_unseen_tasks() -> None:
    data = {"name": "generated", "examples_per_task": 10, "clients_per_task": 3, "num_unseen_tasks": 9}
    corpus = gather_participants(config_of(data=data)).corpus
    assert len(corpus.clients) > 5000
    prompts = [
        (example.instruction, example.input)
        for own in (*corpus.clients.values(), *corpus.unseen.values())
        for part in (own.train, own.validation, own.test)
        for example in part
    ]
    assert len(set(prompts)) == len(prompts)
    assert not {name.partition(".")[0] for name in corpus.clients} & corpus.unseen.keys()
    # The first owner of a task is the client that the task is without others, and unseen tasks are the same.
    alone = gather_participants(config_of(data={**data, "clients_per_task": 1})).corpus
    assert all(corpus.clients[name] == own for name, own in list(alone.clients.items())[::97])
    assert dict(corpus.unseen) == dict(alone.unseen)


def test_a_method_that_needs_one_rank_is_refused_before_any_data_are_read(tmp_path: Path) -> None:
    missing = {"name": "instructions", "path": str(tmp_path / "missing.jsonl")}
    mixed = [
        {"distribution": "uniform"},
        {"distribution": {"type1": 1, "type4": 3}},
        {"counts": {"type1": 3, "type4": 2}},
    ]
    for clients in mixed:
        with pytest.raises(ConfigError, match=r"method\.name=fedit needs one rank for all clients.*type1.*type4"):
            gather_participants(config_of(method={"name": "fedit"}, data=missing, clients=clients))
    with pytest.raises(FlexLoraError, match=r"missing\.jsonl"):
        gather_participants(config_of(method={"name": "fedit"}, data=missing, clients={"distribution": {"type4": 1}}))
