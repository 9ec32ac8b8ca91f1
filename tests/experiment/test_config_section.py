"""Settings of a wrong kind, size or number are refused in few words, whatever a file holds."""

import time

import pytest

from flexlora.experiment.config_file import ConfigError, dump_config, load_config, parse_config
from flexlora.experiment.config_sources import config_from
from flexlora.foreign import read_yaml


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.learning_rate=true", "training.learning_rate: Input should be a valid number; got true"),
        ("data.num_clients=true", "data.num_clients: Input should be a valid integer; got true"),
        ("rounds.num_rounds=yes", "rounds.num_rounds: Input should be a valid integer; got true"),
        ("evaluation.every=off", "evaluation.every: Input should be a valid integer; got false"),
        ("seed=true", "seed: Input should be a valid integer; got true"),
        ("training.halve_at=[3, on]", "training.halve_at.1: Input should be a valid integer; got true"),
        ("clients.counts={type1: true}", "clients.counts.type1: Input should be a valid integer; got true"),
        ("clients.types={a: {attention: no, ffn: 1}}", "clients.types.a.attention: Input should be a valid integer"),
        ("clients.types={a: {attention: 1, ffn: 1, patterns: {q: on}}}", "clients.types.a.patterns.q: Input should be"),
        ("devices.max_rank=true", "devices.max_rank: Input should be a valid integer; got true"),
    ],
)
def test_true_and_false_are_no_numbers(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("demo", [override])
    assert key in str(refused.value)


def test_an_option_of_a_method_takes_no_truth_for_a_number() -> None:
    with pytest.raises(ConfigError, match=r"method.ridge: Input should be a valid number; got true"):
        config_from("demo", {"method": {"name": "lora_fair", "ridge": True}})


def test_truths_and_numbers_written_otherwise_stay_what_they_were() -> None:
    config = load_config(
        "demo", ["model.trust_remote_code=yes", 'training.learning_rate="0.5"', "training.num_epochs=2", "seed=3.0"]
    )
    assert config.model.trust_remote_code is True and config.seed == 3
    assert (config.training.learning_rate, config.training.num_epochs) == (0.5, 2.0)


@pytest.mark.parametrize("key", ["seed", "data.corpus_seed", "data.num_clients", "devices.round_bytes"])
def test_whole_numbers_of_any_length_are_refused(key: str) -> None:
    for digits in (30, 200, 1000, 20_000):
        with pytest.raises(ConfigError) as refused:
            load_config("demo", [f"{key}=0x{'f' * digits}"])
        assert key in str(refused.value) and len(str(refused.value)) < 600
        section, _, name = key.rpartition(".")
        value = 10**digits
        with pytest.raises(ConfigError, match=rf"{key}: .* at most") as refused:
            config_from("demo", {section: {name: value}} if section else {name: value})
        assert len(str(refused.value)) < 600


def test_the_largest_seed_of_64_bits_is_written_and_read_again() -> None:
    config = load_config("demo", [f"seed={2**64 - 1}", f"data.corpus_seed={-(2**64) + 1}"])
    assert parse_config(read_yaml(dump_config(config), "config.yaml"), "config.yaml") == config


@pytest.mark.parametrize(
    "tree",
    [
        {f"key{number}": 1 for number in range(20_000)},
        {"training": {f"learning_rat{number}": 1 for number in range(20_000)}},
        {"clients": {"types": {f"type{number}": {"attention": "x"} for number in range(20_000)}}},
    ],
)
def test_thousands_of_problems_take_little_time_and_few_lines(tree: dict[str, object]) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError) as refused:
        parse_config(tree, "other.yaml")
    assert time.process_time() - start < 8
    assert len(refused.value.problems) >= 20_000
    first, *problems, last = str(refused.value).split("\n")
    assert first == f"{len(refused.value.problems)} problems in other.yaml:" and len(problems) == 12
    assert last == f"  and {len(refused.value.problems) - 12:,} more"


def test_a_line_break_in_a_name_starts_no_line_of_the_message() -> None:
    trees = [{"a\nError: fake": 1}, {"training": {"a\nError: fake": 1}}, {"clients": {"types": {"a\nError: x": 1}}}]
    for tree in trees:
        with pytest.raises(ConfigError) as refused:
            parse_config(tree, "a\nError: file.yaml")
        head, *lines = str(refused.value).split("\n")
        assert head.endswith("a\\x0aError: file.yaml:")
        assert all(line.startswith("  - ") for line in lines) and "a\\x0aError: " in "".join(lines)
