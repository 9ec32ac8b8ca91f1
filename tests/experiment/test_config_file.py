"""The configuration reports every mistake at once, with key, rule, value and fix."""

from pathlib import Path

import pytest
import yaml

from flexlora.aggregators.registry import package_methods
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import dump_config, load_config, parse_config

PAPER_HEAD = ("Reproduces:", "How:", "Cost:", "Result here:", "The paper's size:")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def problems(tree: dict[str, object], **options: bool) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "test", **options)
    return str(caught.value)


def test_defaults_are_a_valid_configuration() -> None:
    assert parse_config({}, "empty") == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    load_config(path, ["data.path=somewhere"] if "path: null" in text else [])
    head = text.split("seed:")[0]
    for word in ("Launch:", "Expected:", "Cost:") if path.parent.name == "configs" else PAPER_HEAD:
        assert word in head


def test_a_dumped_configuration_reads_back_equal() -> None:
    config = parse_config({"data": {"name": "natural_instructions", "path": "x", "num_unseen_tasks": 3}}, "test")
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


def test_all_mistakes_are_reported_at_once() -> None:
    message = problems(
        {
            "seed": -1,
            "model": {"dtype": "int8", "dtypo": "float32"},
            "training": {"momentum": 0.5},
            "rounds": {"patience": 2},
            "data": {"name": "natural_instructions", "validation_examples": 0},
        }
    )
    for expected in (
        "seed: Input should be greater than or equal to 0; got -1",
        "model.dtype: Input should be 'float32' or 'bfloat16'; got 'int8'",
        "model.dtypo: there is no such setting; did you mean dtype?",
        "data.path: must be set",
        "training.momentum is 0.5",
        "rounds.patience needs a validation set",
        "data holds out no unseen task",
    ):
        assert expected in message
    assert message.startswith("7 problems in test")


def test_a_wrong_variant_lists_the_right_ones() -> None:
    # Other tests may have registered methods of their own.
    listed = problems({"method": {"name": "fedsgd"}}).partition("method.name: must be one of ")[2]
    assert set(package_methods()) <= set(listed.partition("; got 'fedsgd'")[0].split(", "))
    assert (
        "data.name: must be one of generated, natural_instructions, instructions, in_memory, phone_book; got None"
        in problems({"data": {}})
    )


def test_wrong_keys_inside_a_variant_get_a_suggestion() -> None:
    assert "did you mean error_compensation?" in problems({"method": {"name": "flexlora", "error_compensatoin": True}})
    assert "did you mean ffn?" in problems({"clients": {"types": {"a": {"attention": 1, "fnn": 2}}}})


def test_missing_paths_are_reported_when_asked(tmp_path: Path) -> None:
    data = {"name": "natural_instructions", "path": str(tmp_path / "nope"), "num_unseen_tasks": 1}
    message = problems({"data": data, "model": {"name_or_path": "./nowhere"}}, check_paths=True)
    assert "data.path: must be a folder of task files" in message
    assert "model.name_or_path: there is no folder ./nowhere" in message
    for name in ("./nowhere.gguf", "nowhere.gguf", "us/nowhere.GGUF"):
        assert f"there is no file {name}; one on the hub is called org/name/file.gguf" in problems(
            {"model": {"name_or_path": name}}, check_paths=True
        )


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"clients": {"distribution": {"phone": 1}}}, "clients.distribution names the type 'phone'"),
        ({"clients": {"distribution": {"type1": 0}}}, "gives every type weight 0"),
        ({"clients": {"types": {"a": {"attention": 1, "ffn": 1}}}}, "is defined for four types"),
        (
            {"clients": {"types": {"a": {"attention": 0, "ffn": 0}}, "distribution": {"a": 1}}},
            "clients.types.a adapts nothing",
        ),
        ({"clients": {"counts": {"phone": 1}}}, "clients.counts names the type 'phone'; clients.types has type1"),
        ({"clients": {"counts": {"type1": -1}}}, "clients.counts.type1: Input should be greater than or equal to 0"),
        (
            {"clients": {"assigned": {"a": "phone", "b": "type1"}}},
            "clients.assigned must give types of clients.types, which has type1, type2, type3, type4; got a: phone",
        ),
        (
            {
                "clients": {"counts": {"type1": 6}, "assigned": {"a": "type2"}},
                "data": {"name": "generated", "num_clients": 9},
            },
            "are about 7 clients but data.num_clients is 9; change the counts, or set data.num_clients=7",
        ),
        ({"data": {"name": "instructions", "path": "x", "partition": "natural"}}, "set data.client_column"),
        ({"data": {"name": "instructions", "path": "x", "unseen_labels": ["a"]}}, "set data.label_column"),
        ({"data": {"name": "instructions", "path": "x", "unseen_fraction": 0}}, "holds out nothing to score"),
    ],
)
def test_settings_that_disagree_are_named_with_the_fix(tree: dict[str, object], expected: str) -> None:
    assert expected in problems(tree)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"devices": {"rank_choices": 8}}, "devices.rank_choices: must be a list, as devices.rank_choices=[8]; got 8"),
        (
            {"devices": "built_in"},
            "devices: must be a section of settings, as devices.profiles=built_in; got 'built_in'",
        ),
        ({"data": "generated"}, "data: must be a section of settings, as data.name=generated; got 'generated'"),
        ({"clients": {"counts": 3}}, "clients.counts: must be a mapping, as clients.counts={NAME: VALUE}; got 3"),
        ({"ray": {"x": 3}}, "address"),
    ],
)
def test_values_of_the_wrong_shape_are_answered_with_an_example(tree: dict[str, object], expected: str) -> None:
    assert expected in problems(tree)


def test_options_of_a_method_that_contradict_each_other_are_reported_without_loading_it() -> None:
    message = problems({"method": {"name": "flexlora", "spare_directions": 2}, "rounds": {"num_rounds": 0}})
    assert "method.spare_directions=2 is ignored without method.energy" in message and "2 problems" in message


@pytest.mark.parametrize(
    "options",
    [
        {"server_momentum": 0.9, "server_learning_rate": 0.5},
        {"energy": 0.9, "spare_directions": 0, "fold_tail": True},
        {"error_compensation": True, "server_momentum": 0.5, "energy": 0.99},
    ],
    ids=str,
)
@pytest.mark.parametrize("clock", [{}, {"policy": "async"}], ids=str)
def test_combinations_that_are_defined_are_taken(options: dict[str, object], clock: dict[str, object]) -> None:
    tree = {"method": {"name": "flexlora", **options}, "devices": {"profiles": "built_in"}, "clock": clock}
    assert parse_config(tree, "test").method.options().items() >= options.items()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"server_momentum": 1}, "method.server_momentum: Input should be less than 1; got 1"),
        ({"server_learning_rate": 0}, "method.server_learning_rate: Input should be greater than 0; got 0"),
        ({"energy": 0}, "method.energy: Input should be greater than 0; got 0"),
        ({"energy": 1.5}, "method.energy: Input should be less than or equal to 1; got 1.5"),
        (
            {"energy": 0.5, "spare_directions": -1},
            "method.spare_directions: Input should be greater than or equal to 0",
        ),
    ],
)
def test_options_out_of_their_range_are_refused(options: dict[str, object], expected: str) -> None:
    assert expected in problems({"method": {"name": "flexlora", **options}})


def test_counts_replace_a_distribution_that_would_not_fit() -> None:
    types = {name: {"attention": 1, "ffn": 1} for name in ("phone", "server")}
    config = parse_config({"clients": {"types": types, "counts": {"phone": 3}, "assigned": {7: "server"}}}, "test")
    assert config.clients.counts == {"phone": 3}
    assert config.clients.assigned == {"7": "server"}
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


def test_all_languages_are_kept_unless_some_are_named() -> None:
    data = {"name": "natural_instructions", "path": "x", "num_unseen_tasks": 3}
    assert parse_config({"data": data}, "test").data.languages == ()  # type: ignore[union-attr]
    chosen = parse_config({"data": {**data, "languages": ["English"]}}, "test")
    assert chosen.data.languages == ("English",)  # type: ignore[union-attr]


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\nrounds: {num_rounds: 5}\n")
    config = load_config(path, ["rounds.num_rounds=7", "training.learning_rate=1e-4", "method.name=zero_pad"])
    assert (config.seed, config.rounds.num_rounds) == (3, 7)
    assert config.training.learning_rate == 1e-4
    assert config.method.name == "zero_pad"


def test_broken_overrides_and_files_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\n")
    with pytest.raises(ConfigError, match=r"must look like key\.sub=value"):
        load_config(path, ["rounds"])
    with pytest.raises(ConfigError, match="seed is 3, not a section"):
        load_config(path, ["seed.sub=1"])
    with pytest.raises(ConfigError, match=r"there is no such file.*c\.yaml"):
        load_config(tmp_path / "d.yaml")
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        load_config(path)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"clock": {"policy": "over_select"}}, "clock.policy need simulated devices; set devices.profiles=built_in"),
        ({"clients": {"ranks_from": "devices"}}, "clients.ranks_from=devices need simulated devices"),
        ({"devices": {"max_rank": 8}}, "devices.max_rank need simulated devices"),
        ({"devices": {"profiles": "built_in"}, "clock": {"policy": "deadline"}}, "set clock.deadline_seconds"),
        (
            {"devices": {"profiles": "built_in"}, "clock": {"deadline_seconds": 3}},
            "clock.deadline_seconds=3 is ignored by clock.policy=wait",
        ),
        (
            {"devices": {"profiles": "built_in"}, "clock": {"policy": "async"}, "method": {"name": "zero_pad"}},
            "clock.policy=async adds up late changes, which method.name=zero_pad cannot do",
        ),
        (
            {"devices": {"profiles": "built_in", "types": {"phone": "tiny"}}},
            "devices.types.phone must be a type of clients.types, which has type1, type2, type3, type4; got 'tiny'",
        ),
        (
            {"devices": {"profiles": "built_in", "round_seconds": 5}},
            "devices.round_seconds bound ranks that are chosen; set clients.ranks_from=devices",
        ),
    ],
)
def test_devices_and_clock_that_contradict_the_rest_are_reported(tree: dict[str, object], expected: str) -> None:
    assert expected in problems(tree)


def test_a_device_file_that_is_not_there_is_reported_when_asked() -> None:
    assert "there is no file nowhere.csv" in problems({"devices": {"profiles": "nowhere.csv"}}, check_paths=True)


def test_settings_written_out_with_their_defaults_need_no_devices() -> None:
    config = parse_config({"seed": 3}, "test")
    assert parse_config(yaml.safe_load(dump_config(config)), "dump") == config


def test_a_phone_book_needs_a_fact_for_each_client_and_one_way_to_deal_them() -> None:
    book: dict[str, object] = {"name": "phone_book", "num_clients": 4}
    assert "data.num_facts must be 4 or more, one for each client; got 3: raise it or lower data.num_clients" in (
        problems({"data": {**book, "num_facts": 3}})
    )
    message = problems({"data": {**book, "num_facts": 8, "facts_per_client": 2, "facts_by_type": {"type1": 3}}})
    for name in ("facts_per_client", "facts_by_type"):
        assert f"data.num_facts deals all facts evenly and data.{name} would be ignored; leave one of them out" in (
            message
        )
    assert "data.facts_by_type names huge; clients.types has type1, type2, type3, type4" in (
        problems({"data": {**book, "facts_by_type": {"huge": 3}}})
    )
    assert "data.facts_by_type.type1: Input should be greater than or equal to 1; got 0" in (
        problems({"data": {**book, "facts_by_type": {"type1": 0}}})
    )
    devices = {"devices": {"profiles": "built_in"}, "clients": {"ranks_from": "devices"}}
    assert "clients.ranks_from=devices has none; set data.facts_per_client" in (
        problems({"data": {**book, "facts_by_type": {"type1": 3}}, **devices})
    )
    assert "data.code_length: Input should be greater than or equal to 1; got 0" in (
        problems({"data": {**book, "code_length": 0}})
    )
    assert "data.facts_per_client: Input should be greater than or equal to 1; got 0" in (
        problems({"data": {**book, "facts_per_client": 0}})
    )


@pytest.mark.parametrize(
    ("training", "fault"),
    [
        ({"schedule": "constant", "final_learning_rate": 1e-4}, "only training.schedule=linear and cosine fall"),
        ({"schedule": "cosine", "learning_rate": 1e-4, "final_learning_rate": 1e-3}, "is above training.learning_rate"),
    ],
)
def test_a_final_learning_rate_is_one_that_rates_fall_to(training: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        parse_config({"data": {"name": "generated"}, "training": training}, "test")
