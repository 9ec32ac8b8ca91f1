"""What tools for training wrap around modules is taken out of their names, alone or beside other adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from flexlora.adapters.merge import merge
from flexlora.adapters.stored_names import stored_names

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]


def renamed(folder: Path, change: Callable[[str], str]) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("base_model.model.", "base_model._orig_mod.model."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("base_model.model.", "base_model.model.module."),
        lambda key: key.replace(".layers.0.", ".layers.0._orig_mod."),
        lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._checkpoint_wrapped_module."),
        lambda key: key.replace(".lora_", "._orig_mod.lora_"),
        lambda key: key.replace(".weight", "._orig_mod.weight"),
        lambda key: f"base_model.model.{key}",
        lambda key: f"base_model.model.base_model.model._orig_mod.{key}",
        lambda key: key.replace(".self_attn.", "._fpw_module.self_attn."),
        lambda key: key.replace(".self_attn.", "._wrapped_module.self_attn._module."),
        lambda key: f"_forward_module.module.module.{key}",
        lambda key: key.replace(".layers.0.", ".layers.0.module."),
        lambda key: key.replace(".self_attn.", ".self_attn.module."),
        lambda key: key.replace(".model.layers.", ".model.module.layers."),
    ],
    ids=(
        "front parallel both inside model module layer fsdp leaf factor twice thrice fpw block lightning ddp-block "
        "ddp-attention ddp-body"
    ).split(),
)
def test_wrapped_names_give_the_adapter_without_them(
    network: PreTrainedModel,
    save: Save,
    change: Callable[[str], str],
    tmp_path: Path,
    deltas: Helper,
    assert_same_changes: Check,
) -> None:
    config = {"r": 2, "lora_alpha": 6, "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3}}
    folder = save(network, target_modules=EVERYTHING, **config)
    expected = deltas(network, folder)
    result = merge([renamed(folder, change)], out=tmp_path / "out")
    assert any("put around modules was taken out" in note for note in result.notes)
    assert_same_changes(deltas(network, tmp_path / "out"), expected)
    other = save(network, r=2, lora_alpha=6, target_modules=EVERYTHING)
    assert len(merge([folder, other], out=tmp_path / "both").modules) == len(expected)


def test_one_module_with_and_without_a_wrapper_is_refused(plain: Path, assert_refused: Check) -> None:
    path = plain / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {key.replace(".layers", "._orig_mod.layers"): torch.ones(2, 32)}, path)
    assert_refused([plain], "q_proj is stored twice, with and without what torch.compile or FSDP wraps around it")


def test_a_part_of_a_model_that_is_called_module_stays() -> None:
    keys = [f"base_model.model.{path}.lora_A.weight" for path in ("module.q", "head")]
    assert [stored.path for stored in stored_names(keys).values() if stored] == ["module.q", "head"]


@pytest.mark.parametrize(
    "paths",
    [
        # Levit of transformers, a model inside another, and modules beside one that is called so.
        ["encoder.stages.0.layers.0.module.queries_keys_values.linear"],
        ["layers.0.module.self_attn.q_proj", "layers.0.mlp.up_proj"],
        ["base_model.model.layers.0.self_attn.q_proj"],
        ["layers.0.self_attn.q_proj.module"],
    ],
)
def test_a_part_that_a_model_may_have_stays_and_is_noted(paths: list[str], plain: Path, tmp_path: Path) -> None:
    keys = {f"base_model.model.{path}.lora_{letter}.weight": torch.ones(2, 2) for path in paths for letter in "AB"}
    save_file(keys, plain / "adapter_model.safetensors")
    assert [stored.path for stored in stored_names(keys).values() if stored] == [path for path in paths for _ in "AB"]
    result = merge([plain], out=tmp_path / "out")
    assert sorted(module.path for module in result.modules) == sorted(paths)
    noted = [note for note in result.notes if "may be what a tool put around modules; if the base has no such" in note]
    part = "base_model.model" if paths[0].startswith("base_model") else "module"
    assert len(noted) == 1 and f"{part} in {paths[0]} may be" in noted[0]
