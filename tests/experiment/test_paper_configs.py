"""What the head of a configuration of the paper's experiments says to type can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from flexlora.experiment.config import Config
from flexlora.experiment.config_file import load_config
from flexlora.federation.client_types import DISTRIBUTIONS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "paper").glob("*.yaml"))
SECTIONS = tuple(Config.model_fields)
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def head_of(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


def commands(path: Path) -> list[list[str]]:
    return [shlex.split(line) for line in head_of(path) if line.startswith(("flexlora ", "python "))]


def overrides_in(command: list[str]) -> list[str]:
    return [word for word in command if re.match(rf"({'|'.join(SECTIONS)})[.=]", word)]


def option(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def placed(path: Path, overrides: list[str]) -> list[str]:
    needs_path = "path: null" in path.read_text(encoding="utf-8")
    return [*(["data.path=somewhere"] if needs_path else []), *overrides]


@every_config
def test_every_command_names_its_own_file_and_settings_that_exist(path: Path) -> None:
    launched = [command for command in commands(path) if command[0] == "flexlora"]
    assert launched
    for command in launched:
        assert command[1] in ("run", "compare", "plan")
        assert ROOT / command[2] == path
        load_config(path, placed(path, overrides_in(command)))
        named = option(command, "--distributions")
        assert set(named.split(",") if named else []) <= set(DISTRIBUTIONS)
        assert command[1] == "plan" or option(command, "--out")


@every_config
def test_methods_to_compare_can_be_read(path: Path) -> None:
    arms = pytest.importorskip("flexlora.experiment.compare_arms")
    for command in commands(path):
        if command[1] == "compare":
            methods = option(command, "--methods")
            assert methods and arms.read_arms(methods)


@every_config
def test_programs_that_read_runs_exist_and_read_what_a_command_before_wrote(path: Path) -> None:
    written: set[str | None] = set()
    for command in commands(path):
        if command[0] == "python":
            assert (ROOT / command[1]).is_file()
            assert {word for word in command[2:] if word.startswith("runs/")} <= written
        written.add(option(command, "--out"))


@every_config
def test_the_settings_of_the_papers_own_size_are_valid_together(path: Path) -> None:
    head = head_of(path)
    start = next(number for number, line in enumerate(head) if line.startswith("The paper's size:"))
    words = shlex.split(
        " ".join(line.removesuffix("\\") for line in head[start:] if line.startswith((*SECTIONS, '"data=')))
    )
    config = load_config(path, placed(path, overrides_in(words)))
    assert config.model.name_or_path == "datajuicer/LLaMA-1B-dj-refine-150B"
    assert config.lora.scaling == "constant_alpha" and config.lora.lora_alpha == 16
    assert config.training.batch_size * config.training.gradient_accumulation_steps == 4
