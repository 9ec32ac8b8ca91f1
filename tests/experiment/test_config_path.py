"""A path that leads to something else than a file is told for what it is; pipes are read."""

import os
from pathlib import Path

import pytest

from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import load_config


def test_a_folder_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder, and a configuration is a YAML file; it holds none"):
        load_config(tmp_path)
    (tmp_path / "mine.yml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"it is a folder, .*it holds .*mine\.yml"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match=r"it is a folder, .*name .*config\.yaml$"):
        load_config(tmp_path)
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(ConfigError, match=r"it is the folder of a run, .*config\.yaml --out .* --resume"):
        load_config(tmp_path)


def test_a_pipe_is_read() -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"seed: 7\n")
        os.close(writer)
        assert load_config(f"/dev/fd/{reader}").seed == 7
    finally:
        os.close(reader)


def test_a_device_is_read_as_far_as_a_configuration_can_be_long() -> None:
    assert load_config("/dev/null").seed == 0
    with pytest.raises(ConfigError, match="must have at most 10,000,000 bytes"):
        load_config("/dev/zero")


@pytest.mark.parametrize(
    "name", ["nowhere.yaml", "x" * 300, "a\0b", "config.yaml/x"], ids=["none", "long", "nul", "below"]
)
def test_what_is_not_there_is_said_to_be_missing(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / name)
