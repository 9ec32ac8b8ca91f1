"""Patterns of adapters with wrapped modules give the scaling that PEFT trained with, or are refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from flexlora.adapters.folder import read_adapter

QUERY = "model.layers.0.self_attn.q_proj"
Check = Callable[..., None]
pytestmark = pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match")


def peft_scalings(model: torch.nn.Module) -> dict[str, float]:
    """The scaling of every module by the end of its name, with PEFT as the authority."""
    return {
        name[name.index("model.layers") :]: layer.scaling["default"]
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


class Wrapped(torch.nn.Module):
    """A model inside another, as DataParallel has it."""

    def __init__(self, module: PreTrainedModel) -> None:
        super().__init__()
        self.module = module
        self.config = module.config


def compiled(network: PreTrainedModel) -> Any:
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, Wrapped], ids=["compile", "parallel"])
@pytest.mark.parametrize("ranks", [{}, {r"layers\.1\.self_attn\.q_proj": 3}], ids=["one-rank", "ranks"])
@pytest.mark.parametrize(
    "pattern",
    [
        r"^FRONT\.model\.layers\.\d+\.self_attn\.q_proj",
        r"FRONT.model.layers.0.self_attn.q_proj",
        r"^model\.layers\.\d+\.self_attn\.q_proj",
        r"model\.layers\.0\.self_attn\.q_proj",
        "q_proj",
        r"^[a-z]+\.layers\.0\.self_attn\.v_proj",
    ],
)
def test_a_model_wrapped_first_has_the_scalings_that_peft_gave_it(
    network: PreTrainedModel, tmp_path: Path, wrap: Callable[..., Any], ranks: dict[str, int], pattern: str
) -> None:
    front = "module" if wrap is Wrapped else "_orig_mod"
    alphas = {pattern.replace("FRONT", front): 64}
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], alpha_pattern=alphas, rank_pattern=ranks
    )
    model = get_peft_model(wrap(copy.deepcopy(network)), config)
    expected = peft_scalings(model)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    assert any(f".{front}." in key for key in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    found = {path: factors.scaling for path, factors in read_adapter(tmp_path / "a").items()}
    assert found == pytest.approx(expected)


def test_a_rank_pattern_of_a_compiled_model_is_read_as_peft_read_it(network: PreTrainedModel, tmp_path: Path) -> None:
    ranks = {r"^_orig_mod\.model\.layers\.0\.self_attn\.q_proj": 5, r"^model\.layers\.1\.self_attn\.q_proj": 7}
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], rank_pattern=ranks, alpha_pattern=ranks)
    model = get_peft_model(compiled(copy.deepcopy(network)), config)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    found = {path: factors.scaling for path, factors in read_adapter(tmp_path / "a").items()}
    assert found == pytest.approx(peft_scalings(model))


def wrapped_afterwards(network: PreTrainedModel, folder: Path, wrapper: str, **config: Any) -> dict[str, float]:
    """Save an adapter whose layers were wrapped after training and return the scalings it was trained with."""
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], **config)
    model = get_peft_model(copy.deepcopy(network), lora)
    model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace(".self_attn.", f".{wrapper}.self_attn."): value for key, value in tensors.items()}, path)
    return peft_scalings(model)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_layers_wrapped_afterwards_are_read_without_wrappers_where_that_is_certain(
    network: PreTrainedModel, tmp_path: Path, wrapper: str, assert_refused: Check
) -> None:
    pattern = r"layers\.0\.self_attn\.q_proj"
    # The rank tells that patterns were matched with plain names.
    ranks = {"rank_pattern": {pattern: 3}, "alpha_pattern": {pattern: 64}}
    expected = wrapped_afterwards(network, tmp_path / "certain", wrapper, **ranks)
    found = {path: factors.scaling for path, factors in read_adapter(tmp_path / "certain").items()}
    assert found == pytest.approx(expected)
    wrapped_afterwards(network, tmp_path / "unclear", wrapper, alpha_pattern={pattern: 64})
    match = r"alpha_pattern layers.*q_proj in .* must match .*lora_alpha is 2 for .* 64 for .*take the wrappers out"
    assert_refused([tmp_path / "unclear"], match)
    # Names chosen in full tell too.
    path = tmp_path / "unclear" / "adapter_config.json"
    settings = json.loads(path.read_text())
    full = [f"model.layers.{layer}.self_attn.{end}" for layer in range(2) for end in ("q_proj", "v_proj")]
    path.write_text(json.dumps(settings | {"target_modules": full}))
    assert read_adapter(tmp_path / "unclear")[QUERY].scaling == 32
    wrapped = [name.replace(".self_attn", f".{wrapper}.self_attn") for name in full]
    path.write_text(json.dumps(settings | {"target_modules": wrapped}))
    assert read_adapter(tmp_path / "unclear")[QUERY].scaling == 1
