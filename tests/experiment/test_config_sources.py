"""Which configuration a call from Python names, and what its settings do."""

from pathlib import Path

import numpy as np
import pytest

from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import load_config, parse_config
from flexlora.experiment.config_sources import config_from, name_of_source

ROOT = Path(__file__).parents[2]


def test_the_demo_of_the_package_is_that_of_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = ROOT / "flexlora" / "experiment" / "demo.yaml"
    assert ours.read_bytes() == (ROOT / "configs" / "demo.yaml").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert config_from("demo", {}) == load_config(ROOT / "configs" / "demo.yaml")


def test_a_file_a_mapping_and_a_configuration_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("seed: 3\nrounds: {num_rounds: 7}\n")
    tree = {"seed": 3, "rounds": {"num_rounds": 7}}
    expected = parse_config(tree, "test")
    assert config_from(str(tmp_path / "own.yaml"), {}) == expected
    assert config_from(tmp_path / "own.yaml", {}) == expected
    assert config_from(tree, {}) == expected
    assert config_from(expected, {}) == expected
    assert [name_of_source(source) for source in ("demo", tmp_path / "own.yaml", tree)] == ["demo", "own", "run"]


def test_settings_are_written_with_underscores_dots_or_sections() -> None:
    expected = load_config(ROOT / "configs" / "demo.yaml", ["rounds.num_rounds=3", "rounds.cohort_size=5", "seed=1"])
    for settings in (
        {"rounds__num_rounds": 3, "rounds__cohort_size": 5, "seed": 1},
        {"rounds.num_rounds": 3, "rounds.cohort_size": 5, "seed": 1},
        {"rounds": {"num_rounds": 3, "cohort_size": 5}, "seed": 1},
        {"rounds": {"num_rounds": np.int64(3)}, "rounds__cohort_size": np.arange(6)[5], "seed": np.int32(1)},
    ):
        assert config_from("demo", settings) == expected


def test_settings_reach_into_mappings_and_leave_what_was_given_as_it_was() -> None:
    given = {"clients": {"types": {"phone": {"attention": 2, "ffn": 2}}, "distribution": {"phone": 1}}}
    config = config_from(given, {"clients__types__phone__attention": 4})
    assert isinstance(config.clients.types, dict) and config.clients.types["phone"].attention == 4
    assert given["clients"]["types"] == {"phone": {"attention": 2, "ffn": 2}}
    with pytest.raises(ConfigError, match="clients__types__phone: types is 'small', not a section"):
        config_from({"clients": {"types": "small"}}, {"clients__types__phone": {"attention": 1, "ffn": 1}})


def test_another_kind_of_data_keeps_only_what_all_data_have(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    config = config_from("demo", {"data": {"name": "instructions", "path": rows}, "method__name": "zero_pad"})
    assert (config.data.name, config.method.name) == ("instructions", "zero_pad")
    assert (config.data.max_length, config.data.test_examples_per_task) == (192, 4)
    folded = config_from({"method": {"name": "flexlora", "fold_tail": True}}, {"method__split": "balanced"})
    assert folded.method.model_dump()["fold_tail"] is True
    # Options of the method before would be unknown to the next one.
    assert config_from({"method": {"name": "flexlora", "fold_tail": True}}, {"method": {"name": "fedit"}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rounds": 3}, r"num_rounds: there is no such setting; did you mean rounds__num_rounds\?"),
        ({"rounds_num_rounds": 3}, r"did you mean rounds__num_rounds\?"),
        ({"rouds": {"num_rounds": 3}}, r"rouds: there is no such setting; did you mean rounds\?"),
        ({"zzz": 3}, r"zzz: there is no such setting; known keys here: clients, clock,.*write SECTION__SETTING=VALUE"),
        ({"rounds__num_round": 3}, r"rounds\.num_round: there is no such setting; did you mean num_rounds\?"),
        ({"rounds": 3}, r"rounds: must be a section of settings, as rounds\.num_rounds=3; got 3"),
        ({"seed__x": 3}, r"seed__x: seed is 0, not a section"),
        ({"rounds__num_rounds": "many", "seed": -1}, r"(?s)2 problems in the demo with 2 overrides:.*seed.*num_rounds"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule_and_a_way_out(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from("demo", settings)


def test_a_file_with_a_method_replaces_the_method_of_the_section(tmp_path: Path) -> None:
    text = "@aggregation_method('mine')\n@dataclass(frozen=True)\nclass Mine:\n    scaling: object\n"
    path = tmp_path / "mine.py"
    path.write_text(f"from dataclasses import dataclass\nfrom flexlora import aggregation_method\n{text}")
    before = {"method": {"name": "flexlora", "fold_tail": True}}
    for settings in (
        {"method": {"path": path}},
        {"method__path": path},
        {"method__path": path, "method__name": "mine"},
        {"method__name": "mine", "method": {"path": path}},
    ):
        method = config_from(before, settings).method
        assert (method.name, method.path) == ("mine", str(path))


def test_the_order_of_the_settings_of_a_section_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}")
    settings = {"data__unseen_fraction": 0.5, "data__path": path, "data__name": "instructions"}
    for keys in (list(settings), list(settings)[::-1]):
        data = config_from("demo", {key: settings[key] for key in keys}).data
        assert (data.name, data.path, data.unseen_fraction) == ("instructions", str(path), 0.5)


def test_a_mapping_with_unknown_keys_gets_the_messages_of_a_file() -> None:
    with pytest.raises(ConfigError, match=r"roundz: there is no such setting; did you mean rounds\?"):
        config_from({"roundz": {}}, {})


def test_a_name_that_is_no_file_is_told_of_the_demo(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'there is no such file.*; "demo" comes with flexlora'):
        config_from("dmeo", {})
    with pytest.raises(ConfigError, match=r"own\.yaml:\n  - there is no such file[^\"]*$"):
        config_from(tmp_path / "own.yaml", {})


def test_paths_are_checked_as_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"model\.name_or_path: there is no folder \./nowhere"):
        config_from(Config(), {"model__name_or_path": "./nowhere"})
