"""What the folder of a comparison accepts as the comparison that it holds."""

import json
from pathlib import Path

import pytest
import yaml

from flexlora.experiment.compare_arms import CompareError, read_arms
from flexlora.experiment.compare_folder import STUDY_FILE, open_comparison
from flexlora.experiment.compare_jobs import Study
from flexlora.experiment.compare_study import make_study

CONFIG = Path(__file__).parents[2] / "configs" / "study.yaml"


def study() -> Study:
    return make_study(CONFIG, [], read_arms("flexlora"), draws=1)


def rewrite(folder: Path, every: int) -> None:
    """Let a folder look as an earlier version wrote it, which had not all settings."""
    known = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))
    config = yaml.safe_load(known["config"])
    del config["evaluation"]["fedit_largest_reference"], config["evaluation"]["large_alone_learning_rate"]
    config["evaluation"]["every"] = every
    (folder / STUDY_FILE).write_text(json.dumps({**known, "config": yaml.safe_dump(config)}), encoding="utf-8")


def test_settings_that_came_later_have_their_defaults_in_earlier_folders(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    open_comparison(study(), folder, overwrite=False)
    rewrite(folder, every=4)
    assert open_comparison(study(), folder, overwrite=False) == []
    rewrite(folder, every=5)
    with pytest.raises(CompareError, match="another config"):
        open_comparison(study(), folder, overwrite=False)
