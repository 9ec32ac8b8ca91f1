"""What an answer shows as an example can be written, and one mistake has one answer."""

import re

import pytest

from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import load_config, override_config, parse_config
from flexlora.foreign import read_yaml


def answers(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data=alpaca.json", "data.name=instructions data.path=alpaca.json"),
        ("data=me/hub-set", "data.name=instructions data.path=me/hub-set"),
        ("data=Generated", "data.name=generated"),
        ("data=100", "data.num_clients=100"),
        ("data=[1]", "data.name=generated"),
        ("clients=10", "data.num_clients=10"),
        ("clients=Paper", "clients.types=paper"),
        ("clients=uniform", "clients.distribution=uniform"),
        ("training=0.01", "training.learning_rate=0.01"),
        ("training=3", "training.num_epochs=3"),
        ("training=SGD", "training.optimizer=sgd"),
        ("rounds=3", "rounds.num_rounds=3"),
        ("lora=q_proj", "lora.target_modules=[q_proj]"),
        ("lora=null", "lora.target_modules=all-linear"),
        ("model=gpt2", "model.name_or_path=gpt2"),
        ("method=fedit", "method.name=fedit"),
        ("evaluation=false", "evaluation.every=5"),
    ],
)
def test_a_value_in_the_place_of_a_section_is_answered_with_what_can_be_written(typed: str, meant: str) -> None:
    (answer,) = answers(typed)
    assert f"must be a section of settings, as {meant}; got" in answer
    tree = {"data": {"name": "generated", "num_clients": 48}}
    changes = [meant] if "data.path" not in meant else meant.split()
    assert isinstance(override_config(tree if len(changes) == 1 else {}, "test", changes), Config)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("model.device=gpu", "cuda"),
        ("model.device=CUDA", "cuda"),
        ("model.device=cuda0", "cuda"),
        ("model.dtype=bf16", "bfloat16"),
        ("model.dtype=fp32", "float32"),
        ("clients.types=Paper", "paper"),
        ("clients.distribution=heavy-tail-light", "heavy_tail_light"),
        ("training.optimizer=AdamW", "adamw"),
        ("data.name=instruction", "instructions"),
    ],
)
def test_a_word_that_is_nearly_right_is_answered_once_and_with_the_right_one(typed: str, meant: str) -> None:
    (answer,) = answers(typed)
    assert answer.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("device", ["mps", "mps:0", "xpu", "tpu"])
def test_a_device_that_is_not_supported_is_led_to_the_cpu(device: str) -> None:
    (answer,) = answers(f"model.device={device}")
    assert "must be auto, cpu, cuda or cuda:N" in answer and "is not supported, use cpu" in answer
    assert "did you mean" not in answer


@pytest.mark.parametrize("typed", ["clients.types=8", "clients.types=[1]", "clients.types=mine"])
def test_a_setting_of_two_shapes_has_one_answer_with_both(typed: str) -> None:
    (answer,) = answers(typed)
    assert "'paper' or 'small', or a mapping, as clients.types={NAME: VALUE}" in answer


def test_a_list_or_a_word_is_answered_with_the_list() -> None:
    (answer,) = answers("lora.target_modules=q_proj")
    assert "'all-linear', or a list, as lora.target_modules=[q_proj]" in answer


@pytest.mark.parametrize(
    ("text", "key"), [("null: 3", "null"), ("true: 1", "true"), ("7: 1", "7"), ("lora: {8: 3}", "8")]
)
def test_a_name_that_is_no_text_is_shown_as_it_is_written(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override_config(read_yaml(text, "test"), "test")
    (answer,) = caught.value.problems
    assert re.search(rf"names of settings must be text; got {key}$", answer)


def test_nothing_in_the_place_of_a_section_is_no_setting_that_must_be_set() -> None:
    with pytest.raises(ConfigError, match=r"clients: must be a section of settings, as clients\.ranks_from=types"):
        parse_config({"clients": None}, "test")
