"""One weight under two names is refused whatever the names are; two weights are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    EsmConfig,
    EsmForMaskedLM,
    EsmModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from flexlora.adapters.folder import read_adapter
from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import MergeError
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import LoraFactors

Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]


def adapter_of(folder: Path, *paths: str, out_features: int = 6) -> Path:
    generator = torch.Generator().manual_seed(len(paths))
    write_adapter(
        folder,
        {
            path: LoraFactors(
                torch.randn(2, 4, generator=generator), torch.randn(out_features, 2, generator=generator), 1.0
            )
            for path in paths
        },
        "base",
    )
    return folder


def test_a_module_under_the_names_of_two_model_classes_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, **sizes)
    for name, network in (("whole", EsmForMaskedLM(config)), ("body", EsmModel(config, add_pooling_layer=False))):
        model = get_peft_model(network, LoraConfig(r=2, target_modules=["query", "value"]))
        model.save_pretrained(tmp_path / name)
    with pytest.raises(MergeError, match=r"encoder\.layer\.0\.attention\.self\.query .* and esm\.encoder\.layer\.0\."):
        merge([tmp_path / "whole", tmp_path / "body"], out=tmp_path / "out")


@pytest.mark.parametrize(
    "front", ["esm", "deberta", "albert", "vit", "mpt", "text_model", "backbone", "llm", "thinker", "any.thing", "a1"]
)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("encoder.layer.0.attention.query", "encoder.layer.0.attention.query"),
        ("pooler.dense", "pooler.dense"),
        # They share no module, but PEFT would still load only one of them.
        ("encoder.layer.0.attention.query", "encoder.layer.1.attention.value"),
    ],
)
def test_a_path_that_ends_in_another_is_refused_unless_one_adapter_has_both(
    tmp_path: Path, front: str, one: str, other: str, assert_refused: Check
) -> None:
    folders = [adapter_of(tmp_path / "a", one), adapter_of(tmp_path / "b", f"{front}.{other}")]
    assert_refused(folders, "must name modules alike")
    assert_refused(folders[::-1], "must name modules alike")
    both = adapter_of(tmp_path / "both", one, f"{front}.{other}")
    given = [read_adapter(folder) for folder in (*folders, both)]
    merge([*folders, both], method="sum", exact=True, out=tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    for path in (one, f"{front}.{other}"):
        expected = sum(adapter[path].delta().numpy() for adapter in given if path in adapter)
        np.testing.assert_allclose(found[path].delta().numpy(), expected, atol=1e-5)


def test_modules_of_other_shapes_or_with_other_ends_are_two(tmp_path: Path) -> None:
    for number, (one, other, out_features) in enumerate(
        (
            ("layers.0.q_proj", "model.layers.0.q_proj", 7),
            ("encoder.block.0.q", "decoder.block.0.q", 6),
            ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", 6),
            ("model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.gate_proj", 6),
            ("thinker.model.layers.0.q_proj", "talker.model.layers.0.q_proj", 6),
        )
    ):
        folders = [
            adapter_of(tmp_path / f"a{number}", one),
            adapter_of(tmp_path / f"b{number}", other, out_features=out_features),
        ]
        assert len(merge(folders, out=tmp_path / f"out{number}").modules) == 2


def test_fused_and_split_weights_of_one_block_are_refused(
    network: PreTrainedModel, save: Save, assert_refused: Check
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    phi = Phi3ForCausalLM(Phi3Config(vocab_size=259, pad_token_id=0, num_key_value_heads=2, **sizes))
    fused = save(phi, r=2, target_modules=["qkv_proj", "o_proj"])
    split = save(network, r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    match = r"self_attn\.[kqv]_proj \(.*\) and .*self_attn\.qkv_proj \(.*\) hold one weight"
    assert_refused([fused, split], match, allow_different_bases=True)
    one_of_three = save(network, r=2, target_modules=["v_proj"])
    assert_refused([fused, one_of_three], "hold one weight of a block", allow_different_bases=True)
    gate_up = save(phi, r=2, target_modules=["gate_up_proj"])
    assert_refused([gate_up, save(network, r=2, target_modules=["up_proj"])], r"gate_up_proj .* hold one weight")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("attn.c_attn", "attn.q_proj"),
        ("attention.query_key_value", "self_attn.v_proj"),
        ("attn.Wqkv", "attn.k_proj"),
        ("attn.my_qkv_layer", "attn.k_proj"),
        ("attention.wq", "self_attn.q_proj"),
        ("attention.self.query", "attention.q_lin"),
        ("mlp.w1", "mlp.gate_proj"),
        ("mlp.gate_up", "mlp.w3"),
        ("mlp.experts.0.w1", "feed_forward.experts.0.gate_proj"),
    ],
)
def test_a_role_of_a_block_has_one_name(tmp_path: Path, one: str, other: str, assert_refused: Check) -> None:
    folders = [
        adapter_of(tmp_path / "a", f"layers.3.{one}"),
        adapter_of(tmp_path / "b", f"layers.3.{other}", out_features=4),
    ]
    if "experts" in one:  # in another place, experts of one number are no one weight for sure
        merge(folders, out=tmp_path / "out")
        return
    assert_refused(folders, "hold one weight of a block under two names")
    adapter_of(tmp_path / "c", f"layers.4.{one}", f"layers.4.{other}")
    merge([*folders, tmp_path / "c"], out=tmp_path / "told-apart")
