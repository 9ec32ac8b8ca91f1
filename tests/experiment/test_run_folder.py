"""What a run folder may be when a run starts, goes on or is overwritten."""

from pathlib import Path

import pytest

from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config, parse_config
from flexlora.experiment.run_folder import ExperimentError, check_folder


def config_of(**sections: object) -> Config:
    return parse_config(sections, "test")


def folder_with_run(tmp_path: Path, config: Config) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    return folder


def test_a_folder_with_foreign_files_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    folder = folder_with_run(tmp_path, Config())
    (folder / "thesis.tex").write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ExperimentError, match=r"also holds thesis\.tex"):
            check_folder(Config(), folder, **{"resume": False, "overwrite": False, **options})
    # A log beside a run does not keep it from going on.
    check_folder(Config(), folder, resume=True, overwrite=False)


def test_the_rest_of_a_deleted_run_is_not_continued(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for resume in (False, True):
        with pytest.raises(ExperimentError, match=r"holds checkpoints but no config\.yaml"):
            check_folder(Config(), tmp_path, resume=resume, overwrite=not resume)


def test_what_a_kill_at_the_first_write_leaves_does_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "config.yaml.partial").write_text("seed")
    check_folder(Config(), tmp_path, resume=True, overwrite=False)
    check_folder(Config(), tmp_path, resume=False, overwrite=False)


def test_a_resumed_run_may_only_get_longer_or_score_fewer_prompts_at_once(tmp_path: Path) -> None:
    folder = folder_with_run(tmp_path, config_of(rounds={"num_rounds": 5}))
    check_folder(config_of(rounds={"num_rounds": 6}), folder, resume=True, overwrite=False)
    smaller = config_of(rounds={"num_rounds": 5}, evaluation={"batch_size": 2})
    check_folder(smaller, folder, resume=True, overwrite=False)
    with pytest.raises(ExperimentError, match=r"differs in rounds\.num_rounds"):
        check_folder(config_of(rounds={"num_rounds": 4}), folder, resume=True, overwrite=False)
    with pytest.raises(ExperimentError, match=r"differs in method\.error_compensation, seed"):
        changed = config_of(seed=1, method={"name": "flexlora", "error_compensation": True}, rounds={"num_rounds": 5})
        check_folder(changed, folder, resume=True, overwrite=False)


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    for folder, why in ((tmp_path / "none", "does not exist"), (tmp_path, "is empty")):
        with pytest.raises(ExperimentError, match=f"there is no run to resume in .*{why}.*leave --resume out"):
            check_folder(Config(), folder, resume=True, overwrite=False)
