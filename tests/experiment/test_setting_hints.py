"""An unknown setting is answered by the one that was meant."""

from typing import get_args

import pytest

from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.setting_hints import ALIKE, RANKS, WORDS, WORDS_IN, hint, models_of, setting_names


def answer(key: str, **section: object) -> str:
    *parents, last = key.split(".")
    tree: dict[str, object] = {**section, last: 8}
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
    assert {f"data.{key}" for key, others in ALIKE.items() for key in (key, *others)} <= known
    assert not {key for key in WORDS_IN if key in known}


@pytest.mark.parametrize(
    ("key", "name", "owner", "meant"),
    [
        ("num_unseen_tasks", "instructions", "generated or natural_instructions", "data.unseen_fraction"),
        ("unseen_tasks", "instructions", "natural_instructions", "data.unseen_labels"),
        ("unseen_categories", "in_memory", "generated or natural_instructions", "data.unseen_labels"),
        ("unseen_owners", "instructions", "in_memory", "data.unseen_labels"),
        ("unseen_fraction", "generated", "in_memory or instructions", "data.num_unseen_tasks"),
        ("unseen_labels", "natural_instructions", "in_memory or instructions", "data.unseen_categories"),
        ("examples_per_task", "instructions", "generated", None),
        ("path", "generated", "instructions or natural_instructions", None),
        ("facts_per_client", "instructions", "phone_book", None),
    ],
)
def test_a_setting_of_other_data_is_told_whose_it_is_and_never_suggested(
    key: str, name: str, owner: str, meant: str | None
) -> None:
    path = {"path": "d.jsonl"} if "instructions" in name else {}
    text = answer(f"data.{key}", name=name, **path)
    assert f"data.{key}: there is no such setting; it belongs to data.name={owner}, and data.name is {name};" in text
    assert f"data={{name: {name}, ...}}" in text
    assert f"did you mean data.{key}" not in text
    assert ("did you mean" in text) is (meant is not None)
    assert meant is None or f"did you mean {meant}?" in text


def test_no_unknown_setting_of_any_data_is_answered_by_itself() -> None:
    models = [model for model in models_of(Config.model_fields["data"].annotation)]
    keys = {key for model in models for key in model.model_fields} - {"name"}
    for model in models:
        (name,) = get_args(model.model_fields["name"].annotation)
        for key in keys - set(model.model_fields):
            assert f"did you mean data.{key}" not in hint(["data", key], list(model.model_fields), name)


def test_a_setting_of_another_method_is_told_whose_it_is() -> None:
    # docs/methods: of these two, only flexlora decomposes a product and so has an energy to keep.
    text = answer("method.energy", name="fedit")
    assert "it belongs to method.name=" in text and "flexlora" in text and "method.name is fedit; remove it" in text
    assert "did you mean" not in text


def test_a_setting_that_only_some_data_have_is_suggested_with_their_names() -> None:
    assert "did you mean data.path (of data.name=instructions or natural_instructions)?" in answer("training.dataset")
    assert "did you mean data.num_clients?" in answer("training.num_clients")


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
