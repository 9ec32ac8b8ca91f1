"""Tables at the end of a command: names of users as they are."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flexlora.experiment.estimate import ClientEstimate, DeviceEstimate, Estimate
from flexlora.experiment.result import RunResult
from flexlora.experiment.run_totals import PartTotals, RunTotals
from flexlora.experiment.terminal import print_estimate, print_evaluation, print_summary
from flexlora.rounds.costs import ClientCost, DeviceCost
from flexlora.rounds.records import EvaluationRecord, ReferencesRecord, RoundRecord, ScoreRecord, append_record


def test_an_estimate_shows_names_of_types_devices_and_files_as_they_are(
    console: Console, shown: Callable[[Console], str], names: tuple[str, ...]
) -> None:
    cost, device_cost = ClientCost(1, 2, 3, 3, 4.0), DeviceCost(1, 2, 3, 4.0, 5.0, 6.0)
    types = [ClientEstimate(name, {f"{name}.q_proj": 8, "v_proj": 4}, 3, cost, 5) for name in names]
    devices = [
        DeviceEstimate(name, "", {}, 1, 9.0, device_cost, "memory", {f"type {name}": "memory"}) for name in names
    ]
    print_estimate(console, Estimate(totals_of(" ".join(names)), types, names, devices))
    for name in names:
        assert shown(console).count(name) == 6  # Base model, type, device, note, and the verdict's device and type.


@pytest.mark.parametrize("width", [60, 120])
def test_what_a_plan_prints_is_whole_at_any_width(width: int, names: tuple[str, ...]) -> None:
    cost, device_cost = ClientCost(123_456, 2 * 10**9, 3 * 10**8, 3 * 10**8, 4.0), DeviceCost(1, 2, 3, 4.0, 5.0, 6.0)
    types = [ClientEstimate(name, {"q_proj": 8, "v_proj": 4}, 3000, cost, 5 * 10**8) for name in names]
    devices = [DeviceEstimate(name, "", {}, 1, 9.0, device_cost, "memory", {}) for name in names]
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=width, emoji=False)
    print_estimate(console, Estimate(totals_of("embedded"), types, (), devices))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert text.count("123,456") == text.count("2.0 GB") == text.count("3,000") == len(names)


def totals_of(base_model: str) -> RunTotals:
    parts = {"rounds": PartTotals(12, 34, 5.0, 6.0, 78), "local_only": PartTotals(2, 3, 4.0, 5.0, 0)}
    return RunTotals(base_model, 10, "float32", "flexlora", 4, 40, 3, 4, 4, 2, 1, parts)


def test_the_scores_of_a_model_have_three_measures_and_fold_categories(
    console: Console, shown: Callable[[Console], str]
) -> None:
    def record_of(gains: list[float]) -> EvaluationRecord:
        scores = [
            ScoreRecord(rouge_l=40 + gain, exact_match=12.5, loss=1.25, num_examples=4, num_tasks=1) for gain in gains
        ]
        categories = {f"kind {place}": score for place, score in enumerate(scores)}
        total = ScoreRecord(rouge_l=40, exact_match=12.5, loss=1.25, num_examples=80, num_tasks=20)
        return EvaluationRecord(unseen=total, unseen_unweighted=total, categories=categories)

    base, tuned = record_of([0.0] * 20), record_of([float(place) for place in range(20)])
    print_evaluation(console, {"base model": base, "rank 8": tuned})
    text = shown(console)
    assert "ROUGE-L, by examples" in text and "exact match, by examples" in text and "loss (nats), by examples" in text
    assert "12.5 %" in text and "1.250" in text and "20 tasks, 80 examples" in text
    # Those that changed most, by hand: the last ten of twenty.
    assert [place for place in range(20) if f"kind {place} " in text] == list(range(10, 20))
    assert "10 more categories changed by 9.0 at most" in text
    print_evaluation(console, {"base model": base, "rank 8": tuned}, most_categories=20)
    assert all(f"kind {place} " in shown(console) for place in range(20))


@pytest.mark.parametrize("name", ["run [bold]", "[b]run"])
def test_results_show_folders_tasks_and_reasons_as_they_are(
    tmp_path: Path,
    name: str,
    console: Console,
    shown: Callable[[Console], str],
    names: tuple[str, ...],
    record_of: Callable[..., RoundRecord],
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    records = [record_of(0), record_of(1)]
    for one in records:
        append_record(folder / "records.jsonl", one)
    result = RunResult(folder, folder / "report.html", "flexlora", 1, "[/lost] gone", True, records, ReferencesRecord())
    print_summary(console, result)
    text = shown(console)
    assert "Unseen tasks after 1 round " in f"{text.splitlines()[0].strip()} "
    assert f"Report   {folder}/report.html" in text and f"Adapters {folder}/adapters" in text
    assert "Stopped early: [/lost] gone" in text
    assert f"{name} " in text.split("On the virtual clock")[1].split("Stopped early")[0]
    assert "No run has scored above its base model, so there is no target" in text
    scores = records[1].evaluation
    assert scores is not None
    print_evaluation(console, {"base model": scores})
    assert all(f" {category} " in shown(console) for category in names)
