"""Cards of what comes out of a run: its own numbers, and nothing of the machine that wrote it."""

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import flexlora
from flexlora.adapters.peft_format import AdapterError
from flexlora.cli import app
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.experiment.base import base_name
from flexlora.experiment.config import Config
from flexlora.experiment.export import export_run
from flexlora.experiment.result import RunResult
from flexlora.experiment.run_card import _facts, run_card
from flexlora.experiment.run_folder import ExperimentError, read_run_config


def lines_of(run: RunResult) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "records.jsonl").read_text().splitlines()]


def texts_of(folder: Path) -> str:
    return "\n".join(
        path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja")
    )


def test_a_card_has_the_runs_own_numbers(small_run: RunResult, tmp_path: Path) -> None:
    export_run(small_run.folder, tmp_path / "out", rank=3)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("flexlora/embedded-llama-1m", "peft")
    assert {"lora", "federated-learning", "aligned"} <= set(card.data.tags) and card.data.license == "apache-2.0"
    last = lines_of(small_run)[-1]["evaluation"]["unseen"]
    base = lines_of(small_run)[0]["evaluation"]["unseen"]
    row = next(line for line in card.content.splitlines() if line.startswith("| Federated"))
    assert f"| {last['rouge_l']:.1f} |" in row and f"| {last['loss']:.3f} |" in row
    row = next(line for line in card.content.splitlines() if line.startswith("| Base model, before"))
    assert f"| {base['rouge_l']:.1f} |" in row and f"| {base['loss']:.3f} |" in row
    for fact in ("| Method | aligned |", "| Rank | 3 |", "| Rounds | 2 of 2 |", "| Clients | 8, 3 in a round |"):
        assert fact in card.content
    assert "this one is cut to rank 3" in card.content


def test_nothing_that_is_written_names_a_folder_of_this_machine(small_run: RunResult, tmp_path: Path) -> None:
    export_run(small_run.folder, tmp_path / "out")
    export_run(small_run.folder, tmp_path / "whole", merged=True)
    for folder in (tmp_path / "out", tmp_path / "whole", small_run.folder / "adapters"):
        text = texts_of(folder)
        assert "flexlora/embedded-llama-1m" in text
        for place in (str(BASE_FOLDER), str(Path.home()), str(tmp_path), str(small_run.folder)):
            assert len(place) < 3 or place not in text
    assert ModelCard.load(tmp_path / "whole" / "README.md").data.library_name == "transformers"


def test_the_code_on_the_card_loads_the_adapter(small_run: RunResult, tmp_path: Path) -> None:
    export_run(small_run.folder, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("this folder", str(tmp_path / "out"))
    names: dict[str, object] = {}
    exec(code, names)
    model, tokens = names["model"], torch.tensor([[1, 40, 50, 60]])
    assert isinstance(model, PeftModel)
    base = AutoModelForCausalLM.from_pretrained(flexlora.resolve_base_model(flexlora.EMBEDDED_BASE))
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_base_in_a_folder_is_called_by_its_last_name_and_the_card_says_so(
    small_run: RunResult, tmp_path: Path
) -> None:
    config = read_run_config(small_run.folder)
    for name, expected in ((str(tmp_path / "my-llama"), "my-llama"), ("org/model", "org/model")):
        changed = config.model_copy(update={"model": config.model.model_copy(update={"name_or_path": name})})
        assert base_name(changed) == expected
        card = run_card(changed, small_run.folder, 2, 16, is_cut=False, with_references=True)
        assert str(tmp_path) not in str(card)
        assert ("was in a local folder called `my-llama`" in str(card)) == (expected == "my-llama")
    assert base_name(Config()) == flexlora.EMBEDDED_BASE


def test_an_export_is_pushed_once_it_is_written(
    small_run: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[set[str]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, exist_ok: f"https://huggingface.co/{repo_id}")
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda api, repo_id, folder_path, commit_message: pushed.append({path.name for path in folder_path.iterdir()}),
    )
    done = CliRunner().invoke(app, ["export", str(small_run.folder), "--push-to-hub", "us/demo", "--json"])
    assert json.loads(done.stdout)["url"] == "https://huggingface.co/us/demo"
    assert pushed == [{"README.md", "adapter_config.json", "adapter_model.safetensors"}]
    with pytest.raises(AdapterError, match="must look like org/name"):
        export_run(small_run.folder, tmp_path / "out", push_to_hub="a/b/c")
    assert not (tmp_path / "out").exists()


def test_what_contradicts_itself_is_refused(small_run: RunResult, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="a merged model has none"):
        export_run(small_run.folder, tmp_path / "out", merged=True, pad_to=16)
    with pytest.raises(AdapterError, match="pad_to must be at least 16"):
        export_run(small_run.folder, tmp_path / "out", pad_to=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("noise_seed", "is_told"), [(None, False), (7, True)])
def test_a_seed_from_which_noise_comes_is_not_on_the_card(
    tmp_path: Path, noise_seed: int | None, is_told: bool
) -> None:
    differential = {"clip": 1.0, "noise_multiplier": 1.0, "noise_seed": noise_seed}
    config = Config.model_validate({"privacy": {"differential": differential}, "seed": 5})
    assert (("Seed", "5") in _facts(config, tmp_path, 1, 4, "base")) is is_told
