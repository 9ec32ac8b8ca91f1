"""An unknown setting is answered by the one that was meant."""

import pytest

from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.setting_hints import RANKS, WORDS, WORDS_IN, setting_names


def answer(key: str) -> str:
    *parents, last = key.split(".")
    tree: dict[str, object] = {last: 8}
    for parent in reversed(parents):
        tree = {parent: tree}
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, "test")
    return str(caught.value)


@pytest.mark.parametrize("key", ["lora.rank", "lora.r", "clients.rank", "rank"])
def test_a_rank_for_all_is_led_to_the_types_of_clients(key: str) -> None:
    # The words of the issue: lora.rank points to clients.types.
    assert "clients.types" in answer(key)


def test_what_the_answer_about_ranks_shows_can_be_written() -> None:
    config = parse_config({"clients": {"types": {"all": {"attention": 8, "ffn": 8}}, "distribution": {"all": 1}}}, "t")
    assert isinstance(config, Config)
    assert "clients.types={all: {attention: 8, ffn: 8}}" in RANKS and "clients.distribution={all: 1}" in RANKS


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "training.learning_rate"),
        ("lora.alpha", "lora.lora_alpha"),
        ("rounds.rounds", "rounds.num_rounds"),
        ("model.name", "model.name_or_path"),
        ("clients.num_clients", "data.num_clients"),
        ("num_rounds", "rounds.num_rounds"),
        ("learning_rate", "training.learning_rate"),
        ("lora.learning_rate", "training.learning_rate"),
        ("strategy", "method.name"),
    ],
)
def test_words_of_other_projects_and_of_other_sections_are_understood(key: str, meant: str) -> None:
    assert f"did you mean {meant}?" in answer(key)


def test_every_word_stands_for_a_setting_that_exists() -> None:
    known = setting_names()
    assert {meaning.partition("=")[0] for meaning in WORDS.values()} <= known
    assert {meaning for meaning in WORDS_IN.values() if meaning != RANKS} <= known
    assert not {key for key in WORDS_IN if key in known}


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "fedprox", "average"])
def test_averaging_of_factors_is_led_to_fedit(name: str) -> None:
    with pytest.raises(ConfigError, match="did you mean fedit"):
        parse_config({"method": {"name": name}}, "test")


@pytest.mark.parametrize(
    ("name", "meant"), [("FlexLoRA", "flexlora"), ("HetLoRA", "het_lora"), ("FFA-LoRA", "ffa_lora"), ("FedIT", "fedit")]
)
def test_a_method_may_be_written_as_in_its_paper(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}"):
        parse_config({"method": {"name": name}}, "test")
