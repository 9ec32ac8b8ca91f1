"""One weight of a block has one role, whatever it is called; two weights of one model are never taken for one."""

from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from flexlora.adapters.folder import read_adapter
from flexlora.adapters.merge import merge
from flexlora.adapters.weight_roles import role_of
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import LoraFactors

Check = Callable[..., None]
BLOCK = "model.layers.3."


def adapter_of(folder: Path, *paths: str, out_features: int = 6, in_features: int = 4) -> Path:
    write_adapter(
        folder,
        {path: LoraFactors(torch.ones(2, in_features), torch.ones(out_features, 2), 1.0) for path in paths},
        "base",
    )
    return folder


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # Phi-2 as transformers, Falcon, GPT-2, CLIP, InternLM2 and BERT have it, beside Llama's name.
        ("self_attn.dense", "self_attn.o_proj"),
        ("self_attention.dense", "self_attn.o_proj"),
        ("attn.c_proj", "self_attn.o_proj"),
        ("attn.out_proj", "attn.o_proj"),
        ("attention.wo", "self_attn.o_proj"),
        ("attention.output.dense", "attention.out_lin"),
        ("attn.Wo", "attention.output.dense"),
        ("self_attention.linear_proj", "self_attn.o_proj"),
        ("attn.attention.out_proj", "attn.c_proj"),
        ("attn1.to_out.0", "attn1.out_proj"),
        ("mlp.w2", "mlp.down_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
        ("mlp.c_proj", "mlp.down_proj"),
        ("mlp.dense_4h_to_h", "mlp.down_proj"),
        ("mlp.fc2", "mlp.fc_out"),
        ("output.dense", "ffn.lin2"),
        ("mlp.dense_h_to_4h", "mlp.gate_proj"),
        ("mlp.dense_h_to_4h", "mlp.up_proj"),
        ("mlp.linear_fc1", "mlp.gate_up_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("intermediate.dense", "ffn.lin1"),
        ("mlp.swiglu.w12", "mlp.w1"),
        ("mlp.w12", "mlp.gate_proj"),
        ("attn.qk_proj", "attn.q_proj"),
        ("attn.qk_proj", "attn.k_proj"),
        ("attn.in_proj", "attn.v_proj"),
        ("self_attn.linear_q", "self_attn.q_proj"),
    ],
)
def test_a_weight_under_two_names_is_refused_unless_one_adapter_has_both(
    tmp_path: Path, one: str, other: str, assert_refused: Check
) -> None:
    folders = [adapter_of(tmp_path / "a", BLOCK + one), adapter_of(tmp_path / "b", BLOCK + other)]
    for order in (folders, folders[::-1]):
        assert_refused(order, "hold one weight of a block under two names, which no model has both of")
    both = adapter_of(tmp_path / "c", f"model.layers.4.{one}", f"model.layers.4.{other}")
    assert len(merge([*folders, both], out=tmp_path / "told-apart").modules) == 4
    wide = adapter_of(tmp_path / "wide", BLOCK + other, in_features=9)
    assert len(merge([folders[0], wide], out=tmp_path / "two").modules) == 2
    elsewhere = adapter_of(tmp_path / "elsewhere", f"model.layers.4.{other}")
    assert len(merge([folders[0], elsewhere], out=tmp_path / "blocks").modules) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("attn.c_proj", "mlp.c_proj"),
        ("attn.c_proj", "mlp.c_fc"),
        ("attn.c_proj", "mlp.down_proj"),
        ("self_attn.dense", "mlp.dense_4h_to_h"),
        ("self_attn.dense", "mlp.fc2"),
        ("attention.output.dense", "output.dense"),
        ("attention.output.dense", "intermediate.dense"),
        ("attention.wo", "feed_forward.w2"),
        ("attn.Wo", "mlp.Wo"),
        ("attn.Wo", "mlp.Wi"),
        ("self_attn.o_proj", "cross_attn.out_proj"),
        ("self_attn.out_proj", "encoder_attn.o_proj"),
        ("SelfAttention.o", "EncDecAttention.out_proj"),
        ("self_attn.o_proj", "linear_attn.out_proj"),
        ("self_attn.o_proj", "mamba.out_proj"),
        ("mlp.down_proj", "mlp.shared_expert.w2"),
        ("mlp.down_proj", "residual_mlp.w2"),
        ("mlp.up_proj", "input_layernorm.mlp.fc1"),
        ("mlp.w1", "mlp.w2"),
        ("mlp.fc1", "mlp.fc2"),
        ("mlp.gate", "mlp.dense_h_to_4h"),
        ("attn1.to_out.0", "attn2.out_proj"),
        ("self_attn.o_proj", "dense"),
    ],
)
def test_two_weights_of_a_block_merge(tmp_path: Path, one: str, other: str) -> None:
    folders = [adapter_of(tmp_path / "a", BLOCK + one), adapter_of(tmp_path / "b", BLOCK + other)]
    assert len(merge(folders, out=tmp_path / "out").modules) == 2
    assert set(read_adapter(tmp_path / "out")) == {BLOCK + one, BLOCK + other}


@pytest.mark.parametrize(
    "model_type",
    "bart bert bloom clip codegen deberta dinov2 falcon falcon_h1 gpt2 gpt_neo gpt_neox gptj llama "
    "modernbert mpt opt phi phi3 qwen2 qwen3_next t5 vit whisper".split(),
)
def test_no_model_of_transformers_has_one_weight_twice(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    if getattr(config, "num_experts", None):
        config.num_experts = 4
    for name in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"):
        if isinstance(getattr(config, name, None), int) and not getattr(config, "layer_types", None):
            setattr(config, name, 2)
    with torch.device("meta"):
        network = transformers.AutoModel.from_config(config)
    found: dict[tuple[str, str, int], dict[str, frozenset[str]]] = defaultdict(dict)
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            role = role_of(path)
            columns = module.nx if isinstance(module, Conv1D) else module.in_features
            found[role.block, role.copy, columns][role.name] = role.roles
    assert any(roles for weights in found.values() for roles in weights.values())
    for place, weights in found.items():
        for one, other in combinations(weights, 2):
            assert not weights[one] & weights[other], (place, one, other)
