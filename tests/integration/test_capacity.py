"""The capacity experiment goes on where it was stopped, and its rows say whose facts which rank recalls."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.integration

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "capacity.py"
SHORT = ["rounds.num_rounds=1", "training.num_epochs=1", "data.facts_per_client=2"]
GROUPS = ["rank1", "rank4", "rank16", "rank64", "all"]


@pytest.fixture(scope="module")
def capacity():
    spec = importlib.util.spec_from_file_location("capacity", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def measured(capacity: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    capacity.federated(capacity.Rows(path), SHORT, ["fedit smallest", "flexlora"], draws=1)
    return path


def test_a_run_leaves_a_row_for_each_group_of_owners_and_each_rank_of_the_reader(capacity, measured):
    run = capacity.Run("federated", "flexlora", capacity.RATES[0], capacity.TUNING_DRAW, capacity.FEDERATED_FACTS)
    rows = capacity.Rows(measured).of(run)
    assert [(row["owner"], row["reader"]) for row in rows] == [
        (owner, rank) for rank in capacity.RANKS for owner in GROUPS
    ]
    smallest = capacity.Rows(measured).of(capacity.dataclasses.replace(run, method="fedit smallest"))
    assert {row["reader"] for row in smallest} == {1}


def test_what_is_in_the_file_is_not_measured_again(capacity, measured, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("measured again")

    before = measured.read_bytes()
    monkeypatch.setattr(capacity, "measure", refuse)
    capacity.federated(capacity.Rows(measured), SHORT, ["fedit smallest", "flexlora"], draws=1)
    assert measured.read_bytes() == before
    table = "\n".join(capacity.capacity_tables(capacity.Rows(measured).rows))
    assert "| `fedit smallest` |" in table and "| `flexlora` |" in table


def test_the_rate_with_the_best_recall_is_chosen_and_the_grid_grows_until_it_is_inside(capacity, monkeypatch, tmp_path):
    recalled = {0.01: 1.0, 0.02: 2.0, 0.04: 3.0, 0.08: 9.0, 0.16: 4.0}

    def pretend(run, overrides):
        own = {"owner": "all", "reader": 64, "loss": 1.0, "exact_match": recalled[run.learning_rate]}
        return [{**vars(run), **own}]

    monkeypatch.setattr(capacity, "measure", pretend)
    rows = capacity.Rows(tmp_path / "rows.jsonl")
    assert capacity.tuned(rows, capacity.Run("federated", "flexlora", 0.0, 0, 128), []).learning_rate == 0.08
    assert {json.loads(line)["learning_rate"] for line in rows.path.read_text().splitlines()} == set(recalled)
