"""The examples of docs/python.md run as they are written, on a demo cut down to some seconds."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import flexlora
from flexlora.adapters.folder import read_adapter
from flexlora.experiment.notebook import run

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[2] / "docs"
SMALL = {
    "model__num_threads": 1,
    "model__num_processes": 1,
    "data__test_examples_per_task": 1,
    "rounds__num_rounds": 1,
    "rounds__cohort_size": 2,
    "training__max_steps": 1,
    "evaluation__max_new_tokens": 2,
    "evaluation__local_only_clients": 0,
    "evaluation__rank_group_clients": 0,
    "evaluation__fedit_reference": False,
    "evaluation__fedit_largest_reference": False,
    "evaluation__large_alone_reference": False,
}
GENERATED = {"data__num_clients": 8, "data__examples_per_task": 20, "data__num_unseen_tasks": 2}


def small_run(*arguments: Any, **settings: Any) -> flexlora.RunResult:
    generated = {} if "data" in settings else GENERATED
    return run(*arguments, quiet=True, **{**SMALL, **generated, **settings})


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    (tmp_path / "median_b.py").write_text(blocks_of("own-method.md")[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flexlora, "run", small_run, raising=False)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks_of("python.md")):
        exec(compile(block, f"python.md, block {number}", "exec"), names)
    sys.modules.pop("median_b", None)
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert runs == {"demo-1", "demo-2", "seed-0", "seed-1", "wards", "own-loop", "trainer", "median"}
    for folder in (tmp_path / "runs").iterdir():
        found = flexlora.open_run(folder)
        assert found.has_progress and found.report.is_file(), folder
        assert {record.num_failed for record in found.rounds} == {0}, folder
    assert flexlora.open_run(tmp_path / "runs" / "demo-1").server_round == 3
    assert flexlora.open_run(tmp_path / "runs" / "median").method == "median_b"
    assert {factors.rank for factors in read_adapter(names["folder"]).values()} == {4}
    assert {factors.rank for factors in names["adapter"].values()} == {4}
