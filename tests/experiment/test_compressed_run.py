"""A run whose updates travel in 4 bits: fewer bytes, what clients remember survives a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_file import load_config
from flexlora.experiment.estimate import estimate_experiment
from flexlora.experiment.run import run_experiment
from flexlora.text import bytes_text

SMALL = [
    "data.num_clients=3",
    "data.num_unseen_tasks=2",
    "data.test_examples_per_task=1",
    "data.validation_examples=8",
    "clients.counts={type1: 1, type4: 2}",
    "rounds.cohort_size=2",
    "rounds.num_rounds=4",
    "training.max_steps=1",
    "training.batch_size=2",
    "evaluation.every=4",
    "evaluation.max_new_tokens=2",
    "evaluation.rank_group_clients=0",
    "evaluation.local_only_clients=0",
    "evaluation.fedit_reference=false",
    "evaluation.fedit_largest_reference=false",
    "evaluation.large_alone_reference=false",
    "model.num_processes=1",
]


def config_of(*overrides: str) -> Config:
    return load_config("configs/demo.yaml", [*SMALL, *overrides])


def records_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Ends a run as a kill would."""


def test_a_run_in_four_bits_sends_a_fraction_and_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    four = config_of("rounds.upload_bits=4", "rounds.error_feedback=true")
    whole = run_experiment(four, tmp_path / "whole")
    plain = run_experiment(config_of(), tmp_path / "plain")

    def kill(event: Any) -> None:
        if (getattr(event, "kind", ""), getattr(event, "server_round", 0)) == ("done", 3):
            raise Killed

    with pytest.raises(Killed):
        run_experiment(four, tmp_path / "cut", notify=kill)
    kept = load_file(sorted((tmp_path / "cut" / "checkpoints").glob("round-*"))[-1] / "state.safetensors")
    assert any(name.startswith("kept/") and "/residual/" in name for name in kept)
    run_experiment(four, tmp_path / "cut", resume=True)
    # The global adapter at the largest rank: the same bits.
    for path in sorted(whole.folder.glob("adapters/*/adapter_model.safetensors")):
        found = load_file(tmp_path / "cut" / path.relative_to(whole.folder))
        assert all(torch.equal(found[name], own) for name, own in load_file(path).items())
    compressed, exact = (
        {client["client_id"]: client["up_bytes"] for one in records_of(run.folder) for client in one["clients"]}
        for run in (whole, plain)
    )
    assert compressed.keys() == exact.keys()
    # An eighth, and at rank 1 as much again for scales and headers.
    shares = sorted(compressed[name] / exact[name] for name in exact)
    assert 1 / 8 < shares[0] < 0.17 and shares[-1] < 0.42


def test_feedback_without_compression_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"set rounds\.upload_bits to 8 or 4"):
        config_of("rounds.error_feedback=true")
    with pytest.raises(ConfigError, match=r"rounds\.upload_bits"):
        config_of("rounds.upload_bits=2")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["method={name: fedsa_lora}"], "clients of method.name=fedsa_lora send one factor only"),
        (["rounds.robust={rule: norm_bound}"], "cannot know whether that one counted"),
    ],
)
def test_feedback_is_refused_where_nothing_can_be_remembered(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config_of("rounds.upload_bits=4", "rounds.error_feedback=true", *overrides)
    config_of("rounds.upload_bits=4", *overrides)


def test_a_plan_says_what_clients_remember() -> None:
    estimate = estimate_experiment(config_of("rounds.upload_bits=4", "rounds.error_feedback=true"))
    # Twice the rank, four bytes a number: 13,872 numbers at rank 1, 221,952 at rank 16.
    expected = bytes_text(8 * (13_872 + 2 * 221_952))
    assert any(f"takes {expected} of memory" in note for note in estimate.notes)
    assert all(row.cost.up_bytes < row.cost.transfer_bytes / 2 for row in estimate.types)
