"""What a result shows of a run, and gives of it."""

import html
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch

from flexlora.adapters.folder import read_adapter
from flexlora.experiment.result import RunResult, open_run
from flexlora.experiment.run_folder import ExperimentError
from flexlora.rounds.records import ReferencesRecord


def lines_of(result: RunResult) -> list[dict]:
    return [json.loads(line) for line in (result.folder / "records.jsonl").read_text().splitlines()]


def test_tables_hold_what_the_records_say(small_run: RunResult) -> None:
    lines = lines_of(small_run)
    records, clients, scores = small_run.records(), small_run.clients(), small_run.scores()
    assert all(isinstance(table, pandas.DataFrame) for table in (records, clients, scores))
    assert list(records["server_round"]) == [0, 1, 2]
    assert list(records["up_bytes"]) == [line["up_bytes"] for line in lines]
    assert list(records["rouge_l"].notna()) == [True, False, True]
    flat = [(line["server_round"], client) for line in lines for client in line["clients"]]
    assert list(zip(clients["server_round"], clients["client_id"], clients["loss"], strict=True)) == [
        (server_round, client["client_id"], client["loss"]) for server_round, client in flat
    ]
    assert list(clients["largest_rank"]) == [max(client["ranks"].values()) for _, client in flat]
    assert list(scores["model"]) == ["Base model", "Federated (aligned)"]
    assert list(scores["rouge_l"]) == [lines[number]["evaluation"]["unseen"]["rouge_l"] for number in (0, 2)]


def test_without_pandas_tables_are_lists_of_rows(small_run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = small_run.clients().to_dict("records")  # type: ignore[union-attr]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = small_run.clients()
    assert isinstance(rows, list) and [row["client_id"] for row in rows] == [row["client_id"] for row in expected]
    assert small_run.records()[0]["train_loss"] is None


def test_an_adapter_is_that_of_the_folder_at_each_rank(small_run: RunResult, tmp_path: Path) -> None:
    for rank in (1, 3):
        adapter = small_run.adapter(rank)
        read = read_adapter(small_run.export(tmp_path / f"rank-{rank}", rank=rank))
        assert adapter.keys() == read.keys()
        for module, factors in adapter.items():
            assert factors.rank == rank
            torch.testing.assert_close(read[module].delta(), factors.delta())
    folders = small_run.folder / "adapters"
    largest = max(int(folder.name.removeprefix("rank-")) for folder in folders.iterdir())
    whole, written = small_run.adapter(), read_adapter(folders / f"rank-{largest}")
    for module, factors in whole.items():
        torch.testing.assert_close(written[module].delta(), factors.delta())
    with pytest.raises(ExperimentError, match=r"rank must be in 1\.\.16, .*; got 17"):
        small_run.adapter(17)


def test_a_result_is_short_and_names_its_folder(small_run: RunResult) -> None:
    scores = [lines_of(small_run)[number]["evaluation"]["unseen"]["rouge_l"] for number in (2, 0)]
    numbers = "unseen ROUGE-L {:.1f}, base model {:.1f}".format(*scores)
    assert repr(small_run) == f"RunResult({small_run.folder}: aligned, 2 rounds, {numbers})"
    stopped = replace(small_run, stopped="enough")
    assert repr(stopped).splitlines()[1:] == ["Stopped early: enough"]
    failed = replace(small_run, rounds=(), references=ReferencesRecord(), server_round=0, has_progress=False)
    assert repr(failed) == (
        f"RunResult({small_run.folder}: aligned, 0 rounds)\nNo progress: no client ever sent a usable update"
    )


def test_a_notebook_shows_a_table_with_names_as_they_are(small_run: RunResult) -> None:
    shown = replace(small_run, method="<b>x</b>", stopped="<script>")._repr_html_()
    assert "<b>" not in shown and "<i>" not in shown and "<script>" not in shown
    assert f"Federated ({html.escape('<b>x</b>')}), after round 2" in shown
    assert "run%20%3Ci%3E1%3C/i%3E/report.html" in shown and html.escape(str(small_run.report)) in shown
    assert shown.count("<tr>") == 3


def test_a_run_is_opened_from_its_folder(small_run: RunResult, tmp_path: Path) -> None:
    found = open_run(str(small_run.folder))
    assert found == small_run
    with pytest.raises(ExperimentError, match=r"the folder of a run holds a config\.yaml"):
        open_run(tmp_path)


def test_a_run_without_a_round_has_no_adapter_yet(small_run: RunResult, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((small_run.folder / "config.yaml").read_bytes())
    started = open_run(tmp_path)
    assert (started.server_round, started.has_progress) == (0, False)
    with pytest.raises(ExperimentError, match="has no round to take an adapter from yet"):
        started.adapter()


def test_a_summary_names_the_adapters_by_rank(small_run: RunResult) -> None:
    named = small_run.summary()["adapters"]
    there = {path.name.removeprefix("rank-"): str(path) for path in (small_run.folder / "adapters").iterdir()}
    assert named == there and list(named) == sorted(named, key=int)
