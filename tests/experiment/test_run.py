"""What a run that cannot start leaves behind."""

from pathlib import Path

import pytest

from flexlora.experiment import run
from flexlora.experiment.config import Config
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.run import run_experiment
from flexlora.experiment.run_folder import ExperimentError


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
