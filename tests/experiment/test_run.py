"""What a run that cannot start leaves behind."""

from pathlib import Path

import pytest

from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.run import run_experiment


def config_of(**sections: object) -> Config:
    return parse_config(sections, "test")


def test_a_start_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "response": "b", "topic": "x"}\n')
    data = {"name": "instructions", "path": str(rows), "partition": "dirichlet", "label_column": "category"}
    with pytest.raises(ValueError, match="there is no column 'category'"):
        run_experiment(config_of(data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
