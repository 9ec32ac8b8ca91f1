"""Runs from Python: where they go, what data, methods and training loops they take, and what they leave alone."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas
import pytest
import torch

from flexlora.data.examples import Example
from flexlora.data.owned_examples import OwnedExample
from flexlora.experiment import notebook
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import load_config
from flexlora.experiment.notebook import run
from flexlora.experiment.result import RunResult
from flexlora.experiment.run_folder import ExperimentError
from flexlora.experiment.score_run import evaluate_run
from flexlora.rounds.records import read_manifest

Small = Mapping[str, Mapping[str, object]]
ROWS = [
    {"owner": f"ward {number % 4}", "instruction": f"Say {number} twice.", "response": f"{number} {number}"}
    for number in range(64)
]


def sgd(model, tokenizer, examples, adapter, settings, seed):
    """One step on the first example."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], settings.learning_rate)
    row = {name: torch.tensor([ids]) for name, ids in examples[0].items()}
    loss = model(**row).loss
    loss.backward()
    optimizer.step()
    return None, {"loss": loss.item(), "steps": 1}


def another(*arguments):
    return sgd(*arguments)


@pytest.fixture
def own(small: Small) -> dict[str, object]:
    """Settings of a run on the rows above."""
    rest = {name: dict(section) for name, section in small.items() if name != "data"}
    return {**rest, "data__min_examples": 4, "clients__distribution": {"type2": 1}, "rounds__num_rounds": 1}


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, object]]:
    """The arguments of runs that end before they begin."""
    seen: list[Mapping[str, object]] = []

    def note(config: object, folder: Path, **arguments: object) -> None:
        seen.append({"config": config, "folder": folder, **arguments})

    monkeypatch.setattr(notebook, "run_experiment", note)
    return seen


def test_without_a_folder_each_run_gets_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: list[Mapping[str, object]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo-1").mkdir(parents=True)
    (tmp_path / "runs" / "demo-1" / "config.yaml").touch()
    run("demo", quiet=True)
    run({"seed": 1}, quiet=True)
    run("demo", "elsewhere", quiet=True)
    assert [call["folder"] for call in stopped] == [Path("runs/demo-2"), Path("runs/run-1"), Path("elsewhere")]
    # A folder that stays empty, as after a start that failed, is removed.
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-1"]


def test_a_start_that_fails_leaves_no_runs_folder_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.name=in_memory stands for examples"):
        run({"data": {"name": "in_memory"}}, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_resuming_and_overwriting_need_a_folder() -> None:
    for option in ("resume", "overwrite"):
        with pytest.raises(ExperimentError, match="need out=, the folder of the run"):
            run("demo", **{option: True})  # type: ignore[arg-type]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ExperimentError, match=r"a run needs a folder to write to; .*run is a file"):
        run("demo", tmp_path / "run", quiet=True)


def test_a_run_is_the_same_as_one_of_its_configuration_and_can_grow(
    small: Small, small_run: RunResult, tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    shorter = run(small_run.folder / "config.yaml", folder, quiet=True, rounds={"num_rounds": 1})
    assert (shorter.server_round, str(shorter.folder)) == (1, folder)
    with pytest.raises(ExperimentError, match=r"already holds a run; resume it \(--resume, resume=True\)"):
        run("demo", folder, quiet=True, **small)
    grown = run("demo", folder, resume=True, quiet=True, **small)
    assert list(grown.clients()["loss"]) == list(small_run.clients()["loss"])  # type: ignore[call-overload]
    for module, factors in small_run.adapter().items():
        assert torch.equal(grown.adapter()[module].delta(), factors.delta())


def test_a_method_is_a_name_or_a_section(stopped: list[Mapping[str, object]]) -> None:
    run("demo", method="zero_pad", quiet=True)
    run("demo", method={"name": "flexlora", "fold_tail": True}, method__split="balanced", quiet=True)
    methods = [call["config"].method for call in stopped]  # type: ignore[attr-defined]
    assert [method.name for method in methods] == ["zero_pad", "flexlora"]
    assert (methods[1].fold_tail, methods[1].split) == (True, "balanced")
    with pytest.raises(ConfigError, match=r"method\.name: must be one of .*zero_pad.*got 'zero_pat'"):
        run("demo", method="zero_pat")


def test_owners_of_examples_are_clients_and_resuming_needs_the_same_examples(
    own: dict[str, object], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    result = run("demo", folder, data=iter(ROWS), quiet=True, **own)
    assert set(result.clients()["client_id"]) <= {f"ward {number}" for number in range(4)}  # type: ignore[call-overload]
    config = load_config(folder / "config.yaml")
    # What the demo says about every kind of data stays.
    assert (config.data.name, config.data.max_length) == ("in_memory", 192)
    longer = {**own, "rounds__num_rounds": 2}
    with pytest.raises(ExperimentError, match="were passed from Python; pass them again as data="):
        run("demo", folder, resume=True, quiet=True)
    with pytest.raises(ExperimentError, match="these have changed: clients"):
        run("demo", folder, resume=True, quiet=True, data=ROWS[4:], **longer)
    assert run("demo", folder, resume=True, quiet=True, data=ROWS, **longer).server_round == 2
    with pytest.raises(ConfigError, match=r"data\.name=in_memory stands for examples"):
        evaluate_run(folder)
    scores = evaluate_run(str(folder), data=ROWS, rank=1)
    assert list(scores) == ["base model", "rank 1"]


def test_examples_come_as_rows_objects_pairs_or_a_frame(stopped: list[Mapping[str, object]]) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield from ROWS

    pairs = [(row["owner"], Example(row["instruction"], "", (row["response"],))) for row in ROWS]
    objects = [OwnedExample(row["owner"], row["instruction"], row["response"]) for row in ROWS]
    for data in (rows(), pairs, objects, pandas.DataFrame(ROWS)):
        run("demo", data=data, quiet=True)
    found = [list(call["data"]) for call in stopped]  # type: ignore[call-overload]
    assert found == [ROWS, pairs, objects, ROWS]
    run("demo", data={"num_clients": 5}, quiet=True)
    last = stopped[-1]
    assert last["data"] is None and last["config"].data.num_clients == 5  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"a file is named by data=\{'name': 'instructions', 'path': 'rows.jsonl'\}"):
        run("demo", data="rows.jsonl")


def test_data_that_hold_nothing_out_are_refused(own: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="data holds out nothing to score"):
        run("demo", data=ROWS, quiet=True, data__unseen_fraction=0, **own)
    with pytest.raises(ConfigError, match="both hold examples out"):
        run("demo", data=ROWS, quiet=True, data__unseen_owners=["a"], data__unseen_labels=["b"], **own)


def test_a_training_loop_of_the_users_own_trains_clients_and_is_needed_to_resume(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {**small, "evaluation": {**small["evaluation"], "local_only_clients": 1}}
    result = run("demo", folder, trainer=sgd, quiet=True, rounds__num_rounds=1, **settings)
    assert set(result.clients()["steps"]) == {1}  # type: ignore[call-overload]
    built_in = run("demo", tmp_path / "other", quiet=True, rounds__num_rounds=1, **settings)
    assert any(
        not torch.equal(factors.delta(), built_in.adapter()[module].delta())
        for module, factors in result.adapter().items()
    )
    alone = [found.references.local_only.own.loss for found in (result, built_in)]  # type: ignore[union-attr]
    assert alone[0] != alone[1]
    with pytest.raises(ExperimentError, match="was trained by sgd; pass it again as trainer="):
        run("demo", folder, resume=True, quiet=True, **settings)
    with pytest.raises(ExperimentError, match="was started without trainer="):
        run("demo", tmp_path / "other", trainer=sgd, resume=True, quiet=True, **settings)
    assert run("demo", folder, trainer=another, resume=True, quiet=True, **settings).server_round == 2
    manifest = read_manifest(folder / "manifest.json")
    assert manifest is not None and manifest.warnings == ["Resumed with trainer another instead of sgd."]


def test_an_interruption_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: object, folder: Path, **arguments: object) -> None:
        folder.mkdir()
        (folder / "config.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(notebook, "run_experiment", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        run("demo", tmp_path / "run", quiet=True)
    assert f"out='{tmp_path}/run' and resume=True goes on" in caught.value.__notes__[0]


def test_torch_and_transformers_are_left_as_they_were(
    monkeypatch: pytest.MonkeyPatch, stopped: list[Mapping[str, object]]
) -> None:
    from transformers.utils import logging as transformers_logging

    def change(*arguments: object, **options: object) -> None:
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert not transformers_logging.is_progress_bar_enabled()

    monkeypatch.setattr(notebook, "run_experiment", change)
    transformers_logging.enable_progress_bar()  # Other tests of the same process may have turned it off.
    before = torch.get_num_threads()
    run("demo", quiet=True)
    assert torch.get_num_threads() == before and not torch.are_deterministic_algorithms_enabled()
    assert transformers_logging.is_progress_bar_enabled()


def test_progress_goes_to_stderr_and_quiet_silences_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stopped: list[Mapping[str, object]]
) -> None:
    run("demo", tmp_path / "a", quiet=True)
    assert capsys.readouterr() == ("", "")
    run("demo", tmp_path / "b")
    shown = capsys.readouterr()
    assert shown.out == "" and "".join(shown.err.split()) == f"Runfolder{tmp_path}/b"


def test_the_summary_is_plain_values(small_run: RunResult) -> None:
    assert json.loads(json.dumps(small_run.summary()))["unseen"]["federated"]["num_tasks"] == 2
