"""What init writes runs as it is, and replaces nothing."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flexlora.cli import app
from flexlora.experiment.config_file import load_config
from flexlora.experiment.notebook import run
from flexlora.experiment.participants import gather_participants
from flexlora.experiment.starter import STARTERS, StarterError, write_starter

FAST = {
    "rounds": {"num_rounds": 1, "cohort_size": 2},
    "training": {"max_steps": 1},
    "evaluation": {"max_new_tokens": 2, "local_only_clients": 0, "fedit_reference": False, "rank_group_clients": 0},
}


@pytest.mark.parametrize("kind", STARTERS)
def test_a_configuration_finds_its_data_and_can_be_planned(kind: str, tmp_path: Path) -> None:
    path = write_starter(kind, tmp_path / "my place: new")  # type: ignore[arg-type]
    config = load_config(path, check_paths=True)
    participants = gather_participants(config)
    assert len(participants.clients) >= 6 and participants.corpus.unseen and participants.validation


@pytest.mark.parametrize("kind", ["own-data", "natural-instructions"])
def test_a_configuration_runs(kind: str, tmp_path: Path) -> None:
    path = write_starter(kind, tmp_path)  # type: ignore[arg-type]
    result = run(path, tmp_path / "run", quiet=True, data={"test_examples_per_task": 1}, **FAST)
    assert result.has_progress and result.server_round == 1


@pytest.mark.parametrize("kind", STARTERS)
def test_every_section_of_a_configuration_is_explained(kind: str, tmp_path: Path) -> None:
    text = write_starter(kind, tmp_path).read_text()  # type: ignore[arg-type]
    sections = text.split("\n\n")[1:]
    assert {section.split(":")[0] for section in sections} == set(yaml.safe_load(text))
    assert all(" # " in section for section in sections)


def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "site-3.jsonl").write_text("mine")
    with pytest.raises(StarterError, match=r"nothing is overwritten, and .*site-3\.jsonl is there already"):
        write_starter("own-data", tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "site-3.jsonl"]
    (tmp_path / "file").touch()
    with pytest.raises(StarterError, match="is a file"):
        write_starter("demo", tmp_path / "file")


def test_the_command_says_what_to_type_next(tmp_path: Path) -> None:
    place = str(tmp_path / "a b")
    done = CliRunner().invoke(app, ["init", "own-data", place], catch_exceptions=False)
    assert f"flexlora run '{place}/config.yaml' --out '{place}/run'" in done.stdout


@pytest.mark.parametrize(
    ("words", "answer"), [(["demo"], "needs the folder"), (["x", "y"], "one of demo"), (["demo", "a", "b"], "one of")]
)
def test_what_init_takes_is_said(words: list[str], answer: str) -> None:
    done = CliRunner().invoke(app, ["init", *words])
    assert isinstance(done.exception, StarterError) and answer in str(done.exception)
