"""The global adapter of a run as a folder, at any rank."""

import re
from pathlib import Path

import pytest

from flexlora.adapters.folder import read_adapter
from flexlora.experiment.export import export_run
from flexlora.experiment.result import RunResult
from flexlora.experiment.run_folder import ExperimentError


def test_the_largest_rank_is_exported_unless_another_is_asked_for(small_run: RunResult, tmp_path: Path) -> None:
    whole = export_run(str(small_run.folder), str(tmp_path / "whole"))
    cut = export_run(small_run.folder, tmp_path / "cut", rank=3)
    assert (whole["rank"], cut["rank"]) == (16, 3) and whole["modules"] == cut["modules"]
    assert {factors.rank for factors in read_adapter(tmp_path / "cut").values()} == {3}


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(small_run: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"the rank must be in 1\.\.16, .*; got 0"):
        export_run(small_run.folder, tmp_path / "a", rank=0)
    with pytest.raises(ExperimentError, match=f"must not exist yet; {re.escape(str(tmp_path))} does"):
        export_run(small_run.folder, tmp_path)
    with pytest.raises(ExperimentError, match=r"the folder of a run holds a config\.yaml"):
        export_run(tmp_path, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
