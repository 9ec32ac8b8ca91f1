"""What a run that cannot start leaves behind."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from flexlora.experiment import estimate, run
from flexlora.experiment.base import BaseModelError, resolve_device
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import dump_config, parse_config
from flexlora.experiment.export import export_run
from flexlora.experiment.result import RunResult
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import ExperimentError, read_run_config
from flexlora.locks import locked
from flexlora.report.page import write_report


def config_of(**sections: object) -> Config:
    return parse_config(sections, "test")


@pytest.mark.parametrize("method", [{"name": "fed_sb"}, {"name": "slora"}, {"name": "het_lora"}])
def test_a_trainer_of_ones_own_is_refused_before_anything_is_read_where_it_cannot_train(
    tmp_path: Path, method: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "gather_participants", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ExperimentError, match=f"trainer of your own .* clients of method.name={method['name']} train"):
        run_experiment(config_of(method=method), tmp_path / "run", trainer=lambda *_: (None, {}))
    assert not (tmp_path / "run").exists()


def test_without_its_penalty_hetlora_takes_a_trainer_of_ones_own() -> None:
    assert config_of(method={"name": "het_lora", "penalty": 0.0}).method.traits().takes_own_training


def test_a_start_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "response": "b", "topic": "x"}\n')
    data = {"name": "instructions", "path": str(rows), "partition": "dirichlet", "label_column": "category"}
    with pytest.raises(ValueError, match="there is no column 'category'"):
        run_experiment(config_of(data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("again", [{}, {"resume": True}, {"overwrite": True}])
def test_a_second_run_in_a_folder_is_refused_at_once_and_the_first_loses_nothing(
    tmp_path: Path, again: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "gather_participants", lambda *_: pytest.fail("data were read"))
    folder = tmp_path / "run"
    with locked(folder, ExperimentError):
        (folder / "config.yaml").write_text(dump_config(config_of()))
        (folder / "records.jsonl").write_text("lines")
        with pytest.raises(ExperimentError, match=rf"a run is going on in {folder} \(process {os.getpid()}\)"):
            run_experiment(config_of(), folder, **again)
        assert (folder / "records.jsonl").read_text() == "lines"


def test_a_report_and_an_adapter_are_written_beside_a_live_run(tmp_path: Path, small_run: RunResult) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder)
    (folder / "report.html").unlink()
    with locked(folder, ExperimentError):
        assert write_report(folder) == folder / "report.html"
        assert export_run(folder, tmp_path / "adapter")["modules"] > 0
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_a_configuration_that_was_changed_since_is_told(
    tmp_path: Path, small_run: RunResult, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder)
    read_run_config(folder)
    assert caplog.text == ""
    text = (folder / "config.yaml").read_text()
    assert "lora_alpha: 2.0" in text
    (folder / "config.yaml").write_text(text.replace("lora_alpha: 2.0", "lora_alpha: 3.0"))
    read_run_config(folder)
    assert "config.yaml is not as the run wrote it" in caplog.text


def test_what_a_killed_run_was_writing_is_no_hindrance(tmp_path: Path, small_run: RunResult) -> None:
    folder = tmp_path / "run"
    shutil.copytree(small_run.folder, folder)
    for name in ("lock", "manifest.json.12345.partial", "config.yaml.partial"):
        (folder / name).write_text("half")
    run_experiment(read_run_config(folder), folder, resume=True)
    assert {path.name for path in folder.iterdir()} == {path.name for path in small_run.folder.iterdir()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_told_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, estimate):
        monkeypatch.setattr(module, "gather_participants", lambda *_: pytest.fail("data were read"))
    config = config_of(model={"device": "cuda"})
    with pytest.raises(BaseModelError, match="needs a CUDA device and there is none"):
        run_experiment(config, tmp_path / "run")
    with pytest.raises(BaseModelError, match="needs a CUDA device and there is none"):
        estimate.estimate_experiment(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "is_there"), [(1, True), (2, False)])
def test_only_devices_that_are_there_are_taken(number: int, is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    if is_there:
        assert resolve_device(f"cuda:{number}") == f"cuda:{number}"
    else:
        with pytest.raises(BaseModelError, match="are cuda:0 to cuda:1"):
            resolve_device(f"cuda:{number}")
