"""A shell completes configurations, settings, methods and runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.verbs import completion


def test_configurations_are_the_demo_files_and_the_folders_that_may_hold_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("a.yaml", "notes.txt", ".hidden.yaml", "deep/b.yml"):
        (tmp_path / name).touch()
    assert list(completion.configurations("")) == ["demo", "a.yaml", "deep/"]
    assert list(completion.configurations("de")) == ["demo", "deep/"]
    assert list(completion.configurations("deep/")) == ["deep/b.yml"]
    assert list(completion.configurations("nowhere/x")) == []


def test_a_run_is_completed_without_the_slash_that_leads_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").touch()
    assert list(completion.runs("runs/")) == ["runs/one", "runs/two/"]


def test_settings_and_methods_are_completed() -> None:
    assert "rounds.num_rounds=" in list(completion.settings("rounds."))
    assert "data.num_clients=" in list(completion.settings("data.num_"))
    assert list(completion.settings("method.name=flex")) == ["method.name=flexlora"]
    assert "fedit" in list(completion.methods("fed"))


def test_bash_is_answered(tmp_path: Path) -> None:
    # What the script that --show-completion prints sends.
    asked = {"_FLEXLORA_COMPLETE": "complete_bash", "COMP_WORDS": "flexlora plan dem", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['flexlora']; from flexlora.cli import app; app(prog_name='flexlora')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked}, cwd=tmp_path
    )
    assert done.stdout.split() == ["demo"]
