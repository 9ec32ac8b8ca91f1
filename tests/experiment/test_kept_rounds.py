"""A run whose checkpoints are gone is told from one that has not got so far, and older rounds are told of."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flexlora.experiment.config_file import parse_config
from flexlora.experiment.kept_rounds import check_checkpoints, check_rank, known_top_rank, tell_of_later_rounds
from flexlora.experiment.run_folder import ExperimentError
from flexlora.rounds.records import ManifestRecord, RoundRecord, append_record, write_manifest


@pytest.fixture
def run(tmp_path: Path, make_manifest: Callable[..., ManifestRecord]) -> Path:
    """Returns a run of 5 rounds with a checkpoint of the last."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "round-0005").mkdir(parents=True)
    for number in range(6):
        append_record(folder / "records.jsonl", RoundRecord(server_round=number))
    manifest = make_manifest(num_rounds=5, plan_ranks={"a": {"q": 3, "v": 6}, "b": {"q": 1}})
    write_manifest(folder / "manifest.json", manifest)
    return folder


def test_checkpoints_that_are_gone_are_not_taken_for_rounds_to_come(run: Path) -> None:
    check_checkpoints(run)
    (run / "adapters" / "rank-6").mkdir(parents=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ExperimentError, match=r"are gone: it has records of 5 rounds.*take .*rank-6 as it is"):
        check_checkpoints(run)
    (run / "records.jsonl").unlink()
    with pytest.raises(ExperimentError, match="let the run finish one"):
        check_checkpoints(run)


@pytest.mark.parametrize(("server_round", "every", "is_told"), [(5, 1, False), (4, 1, True), (3, 10, True)])
def test_a_finished_run_has_a_checkpoint_of_its_last_round(
    run: Path, caplog: pytest.LogCaptureFixture, server_round: int, every: int, is_told: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        tell_of_later_rounds(run, server_round, every)
    assert bool(caplog.records) == is_told
    assert not is_told or f"its newest checkpoint is that of round {server_round}" in caplog.text


@pytest.mark.parametrize(("every", "is_told"), [(3, False), (2, True)])
def test_a_run_at_work_may_be_some_rounds_past_its_checkpoint(
    run: Path, caplog: pytest.LogCaptureFixture, every: int, is_told: bool
) -> None:
    (run / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        tell_of_later_rounds(run, 3, every)
    assert bool(caplog.records) == is_told


def test_the_largest_rank_of_any_plan_is_the_servers(run: Path) -> None:
    config = parse_config({}, "test")
    assert known_top_rank(config, run) == 6
    assert check_rank(None, 6) == check_rank(6, 6) == 6
    with pytest.raises(ExperimentError, match=r"must be in 1\.\.6"):
        check_rank(7, 6)
    (run / "manifest.json").write_text("{")
    assert known_top_rank(config, run) is None
