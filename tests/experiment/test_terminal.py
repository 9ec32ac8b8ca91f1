"""Tables at the end of a command: names of users as they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from flexlora.experiment.estimate import ClientEstimate, DeviceEstimate, Estimate
from flexlora.experiment.result import RunResult
from flexlora.experiment.terminal import print_estimate, print_evaluation, print_summary
from flexlora.rounds.costs import ClientCost, DeviceCost
from flexlora.rounds.records import ReferencesRecord, RoundRecord, append_record


def test_an_estimate_shows_names_of_types_devices_and_files_as_they_are(
    console: Console, shown: Callable[[Console], str], names: tuple[str, ...]
) -> None:
    cost, device_cost = ClientCost(1, 2, 3, 4.0), DeviceCost(1, 2, 3, 4.0, 5.0, 6.0)
    types = [ClientEstimate(name, {f"{name}.q_proj": 8, "v_proj": 4}, 3, cost, 5) for name in names]
    devices = [
        DeviceEstimate(name, "", {}, 1, 9.0, device_cost, "memory", {f"type {name}": "memory"}) for name in names
    ]
    print_estimate(console, Estimate([("Base model", f"models/{name}") for name in names], types, names, devices))
    for name in names:
        assert shown(console).count(name) == 6  # Base model, type, device, note, and the verdict's device and type.


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
