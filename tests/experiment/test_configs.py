"""Every configuration of the project can be read, and its head says how to launch it and what to expect."""

import re
import shlex
from pathlib import Path

import pytest

from flexlora.experiment.compare_arms import read_arms
from flexlora.experiment.config_file import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@every_config
def test_a_configuration_can_be_read_and_its_head_is_whole(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    load_config(path, ["data.path=somewhere"] if "path: null" in text else [])
    head = [line for line in text.splitlines() if line.startswith("#")]
    for part in (r"# What it (reproduces|shows):", "# Launch:", "# Expected:", "# Cost:"):
        assert any(re.match(part, line) for line in head), part
    assert any(f"configs/{path.name}" in line for line in head)


@every_config
def test_commands_in_a_head_name_settings_and_methods_that_exist(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        command = re.search(rf"flexlora (run|compare|plan) configs/{re.escape(path.name)}.*", line)
        if not line.startswith("#") or command is None:
            continue
        words = shlex.split(command.group())
        settings = [word for word in words if re.match(r"[a-z]+\.[a-z_.]+=", word)]
        load_config(path, settings)
        if "--methods" in words:
            assert read_arms(words[words.index("--methods") + 1])
