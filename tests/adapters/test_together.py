"""Adapters that do not change one model in one way are refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import LoraFactors

ATTENTION = ["q_proj", "v_proj"]
Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]


def rename_keys(folder: Path, old: str, new: str) -> Path:
    path = folder / "adapter_model.safetensors"
    renamed = {key.replace(old, new): tensor for key, tensor in load_file(path).items()}
    assert renamed.keys() != load_file(path).keys()
    save_file(renamed, path, metadata={"format": "pt"})
    return folder


def test_different_bases_are_refused_by_name_unless_allowed(
    mixed: list[Path], tmp_path: Path, rewrite: Helper, config_of: Helper, assert_refused: Check
) -> None:
    rewrite(mixed[0], base_model_name_or_path="us/llama/")
    rewrite(mixed[1], base_model_name_or_path="us/llama")
    rewrite(mixed[2], base_model_name_or_path="them/llama")
    assert_refused(
        mixed,
        r"must share one base model; got us/llama \(.*adapter-0\) and them/llama \(.*adapter-2\).*--allow-different",
    )
    result = merge(mixed, allow_different_bases=True, out=tmp_path / "out")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == result.base_model == "us/llama"
    assert any("the result names the first" in note for note in result.notes)
    rewrite(mixed[2], base_model_name_or_path=None)
    result = merge(mixed, out=tmp_path / "nameless")
    assert any("adapter-2 does not say which base model" in note for note in result.notes)
    rewrite(mixed[2], base_model_name_or_path="us/llama", revision="main")
    assert not any("base model" in note for note in merge(mixed, out=tmp_path / "main").notes)
    # A folder of the cache of the hub belongs to the id in its name.
    rewrite(mixed[2], base_model_name_or_path="/me/.cache/huggingface/hub/models--us--llama/snapshots/0a1b2c")
    assert merge(mixed, out=tmp_path / "cached").base_model == "us/llama"
    for folder in mixed:
        rewrite(folder, base_model_name_or_path="/me/llama")
    result = merge(mixed, out=tmp_path / "local")
    assert result.base_model == "/me/llama"
    assert any("named by the folder /me/llama, which other machines lack" in note for note in result.notes)
    for folder in mixed:
        rewrite(folder, base_model_name_or_path="us/llama")
    rewrite(mixed[2], revision="v2")
    assert_refused(mixed, r"got us/llama \(.*adapter-0\) and us/llama@v2 \(.*adapter-2\)")


def test_one_path_with_two_shapes_is_refused(
    plain: Path, deep: PreTrainedModel, save: Save, assert_refused: Check
) -> None:
    other = save(deep, r=2, target_modules=ATTENTION)
    assert_refused(
        [plain, other],
        r"layers\.0\.self_attn\.q_proj must have one shape in all adapters; .* has 32x32 and .* has 16x16: they belong",
    )


def test_a_path_that_is_linear_here_and_an_embedding_there_is_refused(
    plain: Path, tmp_path: Path, assert_refused: Check
) -> None:
    other = shutil.copytree(plain, tmp_path / "other")
    for letter in "AB":
        rename_keys(other, f"lora_{letter}.weight", f"lora_embedding_{letter}")
    assert_refused([plain, other], r"must be of one kind.*other has it as an embedding and .*adapter-0 as a linear mod")


@pytest.mark.parametrize(
    "new",
    [
        "base_model.model.layers",
        "base_model.model.model.language_model.layers",
        "base_model.model.backbone.model.layers",
        "base_model.model.model.some_new_wrapper.layers",
    ],
)
def test_one_module_under_two_names_is_refused(
    plain: Path, network: PreTrainedModel, save: Save, new: str, assert_refused: Check
) -> None:
    other = save(network, r=3, target_modules=ATTENTION)
    rename_keys(other, "base_model.model.model.layers", new)
    prefix = new.removeprefix("base_model.model.").replace(".", r"\.")
    assert_refused([plain, other], rf"must name modules alike;.* {prefix}.* \(.*adapter-1\).*look like one module")
    assert_refused([other, plain], r"must name modules alike; .* and .*: load each adapter on its base with current")
    # One adapter alone changes what it says it changes.
    merge([other], out=other.parent / "alone")


def test_an_adapter_of_a_model_without_its_head_is_refused_beside_one_of_the_whole(
    network: PreTrainedModel, save: Save, assert_refused: Check
) -> None:
    folders = [save(model, r=2, target_modules=ATTENTION) for model in (network, network.model)]
    assert_refused(folders, r"model\.layers\.0\.self_attn\.q_proj \(.*adapter-0\)")


def test_names_of_older_versions_of_transformers_are_refused_beside_current_ones(
    llava: PreTrainedModel, save: Save, tmp_path: Path, logits: Helper, loaded: Helper, assert_refused: Check
) -> None:
    new = save(llava, r=2, std=0.3, target_modules=r".*language_model.*q_proj")
    old = rename_keys(
        shutil.copytree(new, tmp_path / "old"), "model.language_model.layers", "language_model.model.layers"
    )
    # For stock PEFT they are one and the same.
    assert torch.equal(logits(loaded(llava, new)), logits(loaded(llava, old)))
    assert (logits(loaded(llava, new)) - logits(llava)).abs().max() > 0.01
    assert_refused([new, old], r"language_model\.model\.layers\.0\.self_attn\.q_proj \(.*old\)")


def test_modules_of_one_model_whose_names_are_alike_are_no_two_names_of_one(
    llava: PreTrainedModel,
    deep: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
    assert_refused: Check,
) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()
    for number, (network, targets) in enumerate(
        (
            (t5, (r"encoder.*SelfAttention\.q", r"decoder.*SelfAttention\.q")),
            (llava, (r".*language_model.*q_proj", r".*vision_tower.*q_proj")),
            (deep, (r".*layers\.1\..*q_proj", r".*layers\.(0|11)\..*q_proj")),
        )
    ):
        folders = [save(network, r=2, target_modules=target) for target in targets]
        merge(folders, exact=True, method="sum", out=tmp_path / f"out-{number}")
        expected = dense_sum([deltas(network, folder) for folder in folders], (1, 1))
        assert_same_changes(deltas(network, tmp_path / f"out-{number}"), expected)
    # An adapter that has modules under both names says that they are two.
    for name, paths in (("one", ["model.0.proj"]), ("other", ["0.proj"]), ("both", ["model.1.proj", "1.proj"])):
        adapter = {path: LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0) for path in paths}
        write_adapter(tmp_path / name, adapter, "base")
    assert_refused([tmp_path / "one", tmp_path / "other"], "must name modules alike")
    result = merge([tmp_path / name for name in ("one", "other", "both")], out=tmp_path / "two")
    assert [module.path for module in result.modules] == ["0.proj", "model.0.proj", "1.proj", "model.1.proj"]


def test_all_adapters_that_cannot_be_read_are_reported_at_once(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        merge([plain, *(tmp_path / f"gone-{number}" for number in range(12))], out=tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert "gone-0" in lines[0] and lines[-1] == "and 2 more"
