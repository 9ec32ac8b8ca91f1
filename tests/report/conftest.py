"""Hand-made runs on the virtual clock, and rows of a comparison."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexlora.rounds.records import (
    ClientRecord,
    EvaluationRecord,
    ManifestRecord,
    ReferenceRunRecord,
    ReferencesRecord,
    RoundRecord,
    RoundScoreRecord,
    ScoreRecord,
    append_record,
    write_manifest,
    write_references,
)


def _evaluation(rouge_l: float) -> EvaluationRecord:
    score = ScoreRecord(rouge_l=rouge_l, exact_match=0, loss=1, num_examples=4, num_tasks=2)
    return EvaluationRecord(unseen=score, unseen_unweighted=score, validation_loss=3 - rouge_l / 20)


def _client(device: str, seconds: float, outcome: str = "ok", staleness: int = 0) -> ClientRecord:
    return ClientRecord(
        client_id=f"{device}-{seconds}",
        plan=device,
        ranks={"q": 1},
        num_examples=3,
        up_bytes=10,
        down_bytes=20,
        outcome=outcome,  # type: ignore[arg-type]
        stage=None if outcome == "ok" else "train",
        reason=None if outcome == "ok" else "late",
        device=device,
        virtual_seconds=seconds,
        staleness=staleness,
    )


def _rounds_of(scores: dict[int, float], seconds: float, num_rounds: int = 4) -> list[RoundRecord]:
    """Return rounds of equal length; those in ``scores`` were evaluated."""
    records = []
    for number in range(num_rounds + 1):
        clients = [_client("pc", 2.0, staleness=number), _client("tv", 8.0, "failed")] if number else []
        records.append(
            RoundRecord(
                server_round=number,
                clients=clients,
                up_bytes=10 * len(clients),
                down_bytes=20 * len(clients),
                num_ok=len(clients) // 2,
                num_failed=len(clients) // 2,
                evaluation=_evaluation(scores[number]) if number in scores else None,
                virtual_seconds=seconds if number else 0.0,
                virtual_clock_seconds=number * seconds,
            )
        )
    return records


def _manifest(policy: str, target: float | None = None, **changes: object) -> ManifestRecord:
    record = ManifestRecord(
        flexlora_version="0",
        python="3",
        platform="x",
        seed=0,
        config_hash="0",
        base_model="b",
        num_parameters=1,
        method="flexlora",
        num_clients=5,
        num_unseen_tasks=2,
        policy=policy,
        device_counts={"pc": 2, "tv": 2, "watch": 1},
        target_rouge_l=target,
    )
    return record.model_copy(update=changes)


def _folder_of(path: Path, policy: str, records: list[RoundRecord], target: float | None = None) -> Path:
    path.mkdir(parents=True)
    for record in records:
        append_record(path / "records.jsonl", record)
    write_manifest(path / "manifest.json", _manifest(policy, target))
    return path


@pytest.fixture(scope="session")
def evaluation_of() -> Callable[..., EvaluationRecord]:
    """Returns a maker of evaluations of one ROUGE-L."""
    return _evaluation


@pytest.fixture(scope="session")
def rounds_of() -> Callable[..., list[RoundRecord]]:
    """Returns a maker of rounds of equal length."""
    return _rounds_of


@pytest.fixture(scope="session")
def manifest_of() -> Callable[..., ManifestRecord]:
    """Returns a maker of manifests of runs under one policy."""
    return _manifest


@pytest.fixture(scope="session")
def folder_of() -> Callable[..., Path]:
    """Returns a maker of run folders."""
    return _folder_of


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    wait = _folder_of(tmp_path / "patient", "wait", _rounds_of({0: 5.0, 2: 20.0, 4: 30.0}, 100.0))
    reference = ReferenceRunRecord(
        rank="1 in every module",
        evaluations=[
            RoundScoreRecord(server_round=n, unseen=_evaluation(4.0 * n).unseen, virtual_clock_seconds=50.0 * n)
            for n in (0, 2, 4)
        ],
        final=_evaluation(16.0),
    )
    write_references(wait / "references.json", ReferencesRecord(fedit_smallest_rank=reference))
    hasty = _folder_of(tmp_path / "hasty", "async", _rounds_of({0: 5.0, 4: 25.0}, 10.0))
    return [wait, hasty]


class StudyRows:
    """Makes rows of a comparison whose numbers are exact functions of what is asked for, so that a test knows them."""

    def __call__(self, arm: str, draw: int = 0, loss: float | None = 1.7, **changed: Any) -> dict[str, Any]:
        rounds = 0 if arm == "base" else 8
        height = math.nan if loss is None else loss
        row = {
            "kind": "run",
            "phase": "test",
            "draw": draw,
            "seed": 100 + draw,
            "distribution": "uniform",
            "arm": arm,
            "method": arm,
            "options": {},
            "learning_rate": 0.0 if arm == "base" else 0.01,
            "rounds": rounds,
            "clients": 24,
            "curve": [
                {"round": r, "validation_loss": height + 0.1 + 1 / r, "unseen_loss": height + 1 / r - 1 / 8}
                for r in range(2, rounds + 1, 2)
                if loss is not None
            ],
            "validation_loss": None if loss is None else loss + 0.1,
            "unseen": {
                "loss": loss,
                "rouge_l": 40.0 - 10 * height,
                "exact_match": 20.0 - 5 * height,
                "num_examples": 60,
                "num_tasks": 6,
            },
            "categories": None,
            "own_loss": None,
            "up_bytes": 1000,
            "down_bytes": 2000,
            "server_seconds": 0.5,
            "client_seconds": 20.0,
            "seconds": 25.0,
            "diverged": loss is None,
            "failure": None,
            "device": "cpu",
            "version": "0.0",
        }
        return {**row, **changed}

    def tuning(self, arm: str, rate: float, loss: float | None, draw: int = 0, **changed: Any) -> dict[str, Any]:
        """A tuning run with this validation loss."""
        changed = {"unseen": None, "validation_loss": loss, "curve": [], **changed}
        return self(arm, draw, loss, phase="tuning", learning_rate=rate, **changed)

    def study(
        self, gaps: dict[str, float], draws: int = 8, noise: float = 0.01, seed: int = 7, **changed: Any
    ) -> list[dict[str, Any]]:
        """Test runs whose arms lie ``gaps`` above a loss that varies over draws, with noise of their own."""
        rng = np.random.default_rng(seed)
        common = rng.normal(1.7, 0.1, draws)
        own = {arm: rng.normal(gap, noise, draws) for arm, gap in gaps.items()}
        return [self(arm, d, float(common[d] + own[arm][d]), **changed) for d in range(draws) for arm in gaps]


@pytest.fixture
def study_row() -> StudyRows:
    return StudyRows()
