"""The best round of a run beside its last: by validation loss, and never guessed."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flexlora.adapters.folder import read_adapter
from flexlora.experiment.export import export_run
from flexlora.experiment.result import RunResult, open_run
from flexlora.experiment.run_folder import ExperimentError
from flexlora.rounds.checkpoint import replace_progress


@pytest.fixture
def run_copy(small_run: RunResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_run.folder, tmp_path / "run"))


def set_best(folder: Path, best: int | None, loss: float | None) -> None:
    """Write into every checkpoint which round was best, as another run would have."""
    for path in (folder / "checkpoints").glob("round-*/state.json"):
        tree = json.loads(path.read_bytes())
        tree["progress"]["loop"] |= {"best_round": best, "best_validation_loss": loss}
        replace_progress(folder / "checkpoints", tree["server_round"], tree["progress"])


def test_the_best_round_is_exported_from_its_own_checkpoint(run_copy: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == ["round-0001", "round-0002"]
    set_best(run_copy, 1, 0.5)
    assert export_run(run_copy, tmp_path / "best", which="best")["round"] == 1
    shutil.rmtree(run_copy / "checkpoints" / "round-0002")
    assert export_run(run_copy, tmp_path / "first")["round"] == 1
    best, first = read_adapter(tmp_path / "best"), read_adapter(tmp_path / "first")
    assert all(torch.equal(best[module].B, first[module].B) for module in first)


@pytest.mark.parametrize(
    ("best", "loss", "message"),
    [
        (None, None, "has no validation set"),
        (0, 0.25, r"has a lower validation loss than its base model alone \(0\.2500\); take the last round"),
        (None, 0.5, "has no checkpoint of its best round"),
        (7, 0.5, "has no checkpoint of round 7, its best"),
    ],
)
def test_without_a_best_round_the_last_is_not_taken_instead(
    run_copy: Path, tmp_path: Path, best: int | None, loss: float | None, message: str
) -> None:
    set_best(run_copy, best, loss)
    with pytest.raises(ExperimentError, match=message):
        open_run(run_copy).export(tmp_path / "out", which="best")
    assert not (tmp_path / "out").exists()
