"""A damaged model folder is refused by name; nothing of it is trained on."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexlora.training.base_model import load_base_model, load_empty_model
from flexlora.training.linear_modules import ModelError


@pytest.fixture(name="folder")
def _folder(network, tokenizer, tmp_path) -> Path:
    """Returns the folder of a whole model."""
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_base_model(str(folder), dtype="float32", device="cpu", attn_implementation="eager")
    return str(caught.value)


def changed(folder: Path, **settings: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_weights_that_were_cut_off_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "must hold a causal language model" in refusal(folder)


def test_a_weight_that_is_missing_is_not_made_up(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    assert "must hold every weight of its model; missing: model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_a_weight_that_is_no_number_is_named(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    assert "model.norm.weight holds NaN or infinity" in refusal(folder)


def test_large_weights_whose_sum_is_infinite_are_no_damage(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:2] = 3e38
    save_file(tensors, path, {"format": "pt"})
    load_base_model(str(folder), dtype="float32", device="cpu", attn_implementation="eager")


def test_pickles_are_refused_with_the_remedy_and_never_read(folder):
    (folder / "model.safetensors").unlink()

    class Boom:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code of somebody else ran')",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    assert "has pickles, which can run code when they are read: load it with transformers" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "null", "[]", '{"model_type": 5}', "\x1b"])
def test_broken_settings_are_one_error(folder, name, content):
    if not (folder / name).exists():
        pytest.skip("this tokenizer has no such file")
    (folder / name).write_text(content)
    try:
        _, tokenizer = load_base_model(str(folder), dtype="float32", device="cpu", attn_implementation="eager")
    except ModelError as error:
        assert str(folder) in str(error) and "\x1b" not in str(error)
    else:  # Some of these say nothing that matters.
        assert tokenizer("a")["input_ids"]


@pytest.mark.parametrize("key", ["num_hidden_layers", "intermediate_size", "vocab_size", "head_dim"])
def test_sizes_that_no_machine_could_build_are_refused_before_anything_is_built(folder, key):
    changed(folder, **{key: 10**11})
    assert f"{key} in config.json must be at most" in refusal(folder)
    with pytest.raises(ModelError, match=f"{key} in config.json must be at most"):
        load_empty_model(str(folder))


def test_a_vocabulary_of_another_model_is_refused(folder):
    changed(folder, vocab_size=17)
    assert "must hold a causal language model" in refusal(folder)


def test_memory_that_runs_out_is_no_damage(folder, monkeypatch):
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("flexlora.training.base_model.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_base_model(str(folder), dtype="float32", device="cpu", attn_implementation="eager")
