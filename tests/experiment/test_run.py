"""What a run folder may be, who takes part, and what references do when a client fails."""

import json
from pathlib import Path

import pytest

from flexlora.data.corpus_cache import user_cache_folder
from flexlora.experiment.base import BaseModelError, resolve_device
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.loaded import adapted_shapes
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import ExperimentError, check_folder
from flexlora.federation.clients import ClientError, ClientSpec, RankPlan, count_plans, largest_ranks, smallest_ranks

SHAPES = {"l.0.q_proj": (8, 4), "l.0.up_proj": (16, 4), "l.1.q_proj": (8, 4)}


def config_of(**sections: object) -> Config:
    return parse_config(sections, "test")


def folder_with_run(tmp_path: Path, config: Config) -> Path:
    from flexlora.experiment.config_file import dump_config

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def test_a_folder_with_foreign_files_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    folder = folder_with_run(tmp_path, Config())
    (folder / "thesis.tex").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ExperimentError, match=r"also holds thesis\.tex"):
            check_folder(Config(), folder, **{"resume": False, "overwrite": False, **options})
    # A log beside a run does not keep it from going on.
    check_folder(Config(), folder, resume=True, overwrite=False)


def test_the_rest_of_a_deleted_run_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for resume in (False, True):
        with pytest.raises(ExperimentError, match=r"holds checkpoints but no config\.yaml"):
            check_folder(Config(), tmp_path, resume=resume, overwrite=not resume)


def test_what_a_kill_at_the_first_write_leaves_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "config.yaml.partial").write_text("seed")
    check_folder(Config(), tmp_path, resume=True, overwrite=False)
    check_folder(Config(), tmp_path, resume=False, overwrite=False)


def test_a_resumed_run_may_only_get_longer_or_score_fewer_prompts_at_once(tmp_path: Path) -> None:
    folder = folder_with_run(tmp_path, config_of(rounds={"num_rounds": 5}))
    check_folder(config_of(rounds={"num_rounds": 6}), folder, resume=True, overwrite=False)
    smaller = config_of(rounds={"num_rounds": 5}, evaluation={"batch_size": 2})
    check_folder(smaller, folder, resume=True, overwrite=False)
    with pytest.raises(ExperimentError, match=r"differs in rounds\.num_rounds"):
        check_folder(config_of(rounds={"num_rounds": 4}), folder, resume=True, overwrite=False)
    with pytest.raises(ExperimentError, match=r"differs in method\.error_compensation, seed"):
        changed = config_of(seed=1, method={"name": "flexlora", "error_compensation": True}, rounds={"num_rounds": 5})
        check_folder(changed, folder, resume=True, overwrite=False)


def test_a_start_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "response": "b", "topic": "x"}\n')
    data = {"name": "instructions", "path": str(rows), "partition": "dirichlet", "label_column": "category"}
    with pytest.raises(ValueError, match="there is no column 'category'"):
        run_experiment(config_of(data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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


def test_only_tasks_in_the_languages_asked_for_take_part(tmp_path: Path) -> None:
    for number in range(12):
        language = ("English", "Hindi")[number % 2]
        task = {
            "Definition": [f"Say {number}."],
            "Categories": ["Saying"],
            "Input_language": [language],
            "Instances": [{"input": f"{number}, {case}", "output": ["yes"]} for case in range(12)],
        }
        (tmp_path / f"task{number:02d}.json").write_text(json.dumps(task))
    data = {"name": "natural_instructions", "path": str(tmp_path), "num_unseen_tasks": 2}
    everything = gather_participants(config_of(data=data))
    assert (len(everything.clients), everything.warnings) == (10, ())
    english = gather_participants(config_of(data={**data, "languages": ["English"]}))
    names = {client.client_id for client in english.clients} | english.corpus.unseen.keys()
    assert names == {f"task{number:02d}" for number in range(0, 12, 2)}
    assert english.warnings == ("Left out: 6 tasks in other languages.",)


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


def test_generated_examples_are_kept_by_default_and_those_of_others_only_when_asked(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"instruction": "say {n}", "response": "b {n}"}}\n' for n in range(40)))
    own = {"name": "instructions", "path": str(rows), "num_clients": 2, "min_examples": 3}
    generated = {"name": "generated", "num_clients": 20, "examples_per_task": 10}
    kept = gather_participants(config_of(data=generated)).corpus
    assert kept.folder is not None and kept.folder.parent == user_cache_folder()
    assert gather_participants(config_of(data={**generated, "cache": "none"})).corpus.folder is None
    assert gather_participants(config_of(data=own)).corpus.folder is None
    asked = {**own, "cache": str(tmp_path / "cache")}
    first, second = (gather_participants(config_of(data=asked)).corpus for _ in range(2))
    assert first == second and first.folder == second.folder and second.folder.parent == tmp_path / "cache"
    rows.write_text(rows.read_text().replace("b 7", "b changed"))
    changed = gather_participants(config_of(data=asked)).corpus
    assert changed.hashes["clients"] != first.hashes["clients"] or changed.hashes["unseen"] != first.hashes["unseen"]
    assert changed.folder != first.folder


def test_the_smallest_ranks_are_what_every_client_can_afford() -> None:
    low, high = RankPlan("low", (("q_proj", 2), ("", 3))), RankPlan("high", (("", 8),))
    partial = RankPlan("partial", (("q_proj", 1), ("", 0)))
    assert smallest_ranks([low, high], SHAPES) == {"l.0.q_proj": 2, "l.0.up_proj": 3, "l.1.q_proj": 2}
    assert smallest_ranks([low, high, partial], SHAPES) == {"l.0.q_proj": 1, "l.1.q_proj": 1}
    only_up = RankPlan("up", (("up_proj", 4), ("", 0)))
    # Nothing is adapted by both: q_proj at 1 costs 24 parameters, up_proj at 4 costs 80.
    assert smallest_ranks([partial, only_up], SHAPES) == {"l.0.q_proj": 1, "l.1.q_proj": 1}
    assert largest_ranks([low, high, partial], SHAPES) == dict.fromkeys(sorted(SHAPES), 8)


def test_a_plan_that_fits_no_module_is_named() -> None:
    with pytest.raises(BaseModelError, match=r"clients\.types\.phone adapts none of the 3 target modules"):
        adapted_shapes(SHAPES, [RankPlan("phone", (("c_attn", 4),))])


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(BaseModelError, match=r"model\.device=cuda:99"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == "cpu"


def test_a_client_that_cannot_train_alone_is_reported_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexlora.experiment import baselines as references

    clients = [ClientSpec(name, RankPlan("p", (("", 1),)), 3) for name in ("a", "b")]

    class Bench:
        config = Config()

    def sampled(loaded: object, number: int, purpose: str) -> dict[str, list[ClientSpec]]:
        return {"p": clients}

    def alone(loaded: object, loop: object, state: object, client: ClientSpec) -> object:
        raise ArithmeticError("the loss left the finite numbers")

    monkeypatch.setattr(references, "sampled_clients", sampled)
    monkeypatch.setattr(references, "_alone", alone)
    record = references._local_only(Bench(), None, None, lambda event: None)  # type: ignore[arg-type]
    assert [row.failure for row in record.clients] == ["ArithmeticError: the loss left the finite numbers"] * 2
    assert record.own is None
