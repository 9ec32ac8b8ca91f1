import pytest
import torch

from flexlora.data.pretraining import EMBEDDED_BASE
from flexlora.training.base_model import load_base_model, load_empty_model, target_modules
from flexlora.training.linear_modules import ModelError


def test_all_linear_leaves_out_the_output_layer_and_knows_shapes(network):
    shapes = target_modules(network, "all-linear")
    assert len(shapes) == 2 * 7
    assert "lm_head" not in shapes
    assert shapes["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert shapes["model.layers.1.mlp.down_proj"] == (32, 56)
    assert list(shapes) == sorted(shapes)


def test_modules_are_selected_by_the_last_parts_of_their_paths(network):
    shapes = target_modules(network, ["q_proj", "mlp.up_proj"])
    assert set(shapes) == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_a_name_that_matches_nothing_is_refused_with_the_names_there_are(network):
    with pytest.raises(ModelError, match=r"'query'.*down_proj, gate_proj"):
        target_modules(network, ["q_proj", "query"])


def test_a_saved_model_loads_frozen_and_with_its_tokenizer(network, tokenizer, tmp_path):
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = load_base_model(str(tmp_path), dtype="bfloat16", device="cpu", attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert its_tokenizer("a\n€")["input_ids"] == tokenizer("a\n€")["input_ids"]
    empty, _ = load_empty_model(str(tmp_path))
    assert target_modules(empty, "all-linear") == target_modules(loaded, "all-linear")
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_the_base_in_the_package_is_loaded_by_its_public_name():
    loaded, _ = load_base_model(EMBEDDED_BASE, dtype="float32", device="cpu", attn_implementation="sdpa")
    empty, _ = load_empty_model(EMBEDDED_BASE)
    assert loaded.num_parameters() == empty.num_parameters() == 1_416_832


def test_a_model_that_does_not_exist_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (
        load_empty_model,
        lambda name: load_base_model(name, dtype="float32", device="cpu", attn_implementation="sdpa"),
    ):
        with pytest.raises(ModelError, match=r"there is no folder nobody/nothing, no copy .* and the hub .*was not"):
            load("nobody/nothing")
        with pytest.raises(ModelError, match="must hold a causal language model"):
            load(str(tmp_path))
