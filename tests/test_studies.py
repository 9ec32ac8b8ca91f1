"""Studies go on from the rows in results/, their own and those of the study that they share rows with."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flexlora.experiment.compare_folder import locked_comparison, open_comparison
from flexlora.experiment.compare_jobs import due_jobs
from flexlora.report.study_rows import read_rows

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def run_study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.chdir(SCRIPTS.parent)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "studies", raising=False)
    return importlib.import_module("run_study")


@pytest.mark.parametrize("name", ["methods", "aligned", "scaling"])
def test_no_run_of_another_study_is_made_again(run_study: ModuleType, tmp_path: Path, name: str) -> None:
    run_study.take_up(name, tmp_path)
    study = run_study.study_of(run_study.STUDIES[name])
    main = run_study.study_of(run_study.STUDIES["main"])
    with locked_comparison(tmp_path):
        rows = open_comparison(study, tmp_path, overwrite=False)
    shared = {arm.label for arm in study.arms if arm in main.arms}
    assert {"flexlora", "aligned", "fedit_smallest", "base"} <= shared
    assert {job.arm for job in due_jobs(study, rows)}.isdisjoint(shared)


def test_shared_rows_are_taken_up_once(run_study: ModuleType, tmp_path: Path) -> None:
    for _ in range(2):
        run_study.take_up("methods", tmp_path)
    rows = read_rows(tmp_path / "rows.jsonl")
    keys = [run_study._key(row) for row in rows]
    assert rows
    assert len(keys) == len(set(keys))


def test_every_study_of_our_own_data_can_be_made(run_study: ModuleType) -> None:
    own = {name: spec for name, spec in run_study.STUDIES.items() if not name.startswith("smollm2")}
    for name, spec in own.items():
        study = run_study.study_of(spec)
        assert spec.reference in {arm.label for arm in study.arms}, name
