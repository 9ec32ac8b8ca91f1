"""Which modules of which architectures are adapted, and whether PEFT reads and trains exactly those."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from flexlora.adapters.write import write_adapter
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model
from flexlora.training.generation import generate
from flexlora.training.linear_modules import ModelError
from flexlora.training.targets import REFUSED, RENAMED, ROUTING, UNREACHED, find_targets

TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
STATE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **ENDS}
EYES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16},
    "patch_size": 8,
}
MOE = {"head_dim": 8, "moe_intermediate_size": 24, "num_experts_per_tok": 2}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "gemma2": lambda: transformers.Gemma2Config(**TEXT, head_dim=8),
    "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, **ENDS),
    "gptj": lambda: transformers.GPTJConfig(**OLD, n_positions=64, rotary_dim=8),
    "gpt2": lambda: transformers.GPT2Config(**OLD, n_positions=64),
    "mamba": lambda: transformers.MambaConfig(**STATE),
    "mamba2": lambda: transformers.Mamba2Config(**STATE, num_heads=8, head_dim=8, n_groups=2),
    "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **TEXT,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**TEXT, **MOE, num_experts=4, mlp_only_layers=[0]),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**TEXT, **MOE, n_routed_experts=4, first_k_dense_replace=1),
    "phimoe": lambda: transformers.PhimoeConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "jamba": lambda: transformers.JambaConfig(
        **TEXT, attn_layer_period=2, attn_layer_offset=1, expert_layer_offset=1, num_experts=4, mamba_d_state=4
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8}, vision_config=EYES, image_token_index=5, mm_tokens_per_image=4
    ),
    "mllama": lambda: transformers.MllamaConfig(
        text_config={**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}},
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4},
        image_token_index=5,
    ),
}
# Endings of paths that get no adapter, and why: what transformers and PEFT do with them.
LEFT_OUT = {
    "mamba": {"dt_proj": UNREACHED, "out_proj": REFUSED},
    "mamba2": {"out_proj": REFUSED},
    "qwen3_moe": {"gate_proj": RENAMED, "up_proj": RENAMED, "down_proj": RENAMED},
    "glm4_moe": {"gate_proj": RENAMED, "up_proj": RENAMED, "down_proj": RENAMED},
    "phimoe": {"router": ROUTING},
    "jamba": {"dt_proj": UNREACHED},
    "gemma3": {"vision_tower": UNREACHED},
    "mllama": {"layers.1": UNREACHED},
}
HAS_EXPERTS = {"mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "phimoe", "jamba"}


def make(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(CONFIGS[name]())
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


# PEFT says so where a Conv1D of GPT-2 is adapted and the configuration does not mention it.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_what_is_adapted_learns_and_stock_peft_reads_it_as_we_do(family, tokenizer, random_adapter, scaling, tmp_path):
    network = make(family)
    stock = copy.deepcopy(network)
    shapes = find_targets(network, "all-linear").shapes
    model = AdaptedModel(network, tokenizer)
    adapter = random_adapter(shapes, dict.fromkeys(shapes, 2), scaling)
    model.load(Broadcast(adapter))
    wrapped = {path for path, module in network.named_modules() if isinstance(module, LoraLayer)}
    assert wrapped == set(shapes)
    tokens = torch.arange(8, 20)[None]
    logits = network(input_ids=tokens, use_cache=False).logits
    logits.pow(2).mean().backward()
    assert all(torch.any(factor.grad != 0) for path in shapes for factor in model.loaded_factors(path))
    write_adapter(tmp_path / "adapter", adapter, "base")
    expected = PeftModel.from_pretrained(stock, tmp_path / "adapter")(input_ids=tokens, use_cache=False).logits
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.detach().abs().max()))


def test_what_gets_no_adapter_is_named_with_its_reason_before_weights_are_there(family):
    targets = find_targets(make(family), "all-linear")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS[family]())
    assert find_targets(empty, "all-linear") == targets
    reasons = LEFT_OUT.get(family, {})
    for path, why in targets.left_out.items():
        assert any(f".{part}." in f"{path}." and own == why for part, own in reasons.items()), (path, why)
    assert {why for why in reasons.values()} == set(targets.left_out.values())
    text = " ".join(targets.notes)
    assert all(why in text for why in reasons.values())
    assert ("No adapter for the experts" in text) == (family in HAS_EXPERTS)


def test_greedy_answers_are_those_of_transformers(family, tokenizer):
    network = make(family)
    model = AdaptedModel(network, tokenizer)
    prompts = [list(range(8, 8 + length)) for length in (3, 9, 6, 9)]
    expected = []
    for prompt in prompts:
        tokens, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
        whole = network.generate(
            input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=2
        )[0, len(prompt) :].tolist()
        expected.append(whole[: whole.index(2)] if 2 in whole else whole)
    assert generate(model, prompts, 5) == expected


@pytest.mark.parametrize("name", ["gemma2", "bloom", "gptj", "mamba"])
def test_a_saved_model_of_any_architecture_loads_with_the_attention_of_transformers(name, tokenizer, tmp_path):
    make(name).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_base_model(str(tmp_path), dtype="float32", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == stock.config._attn_implementation
    tokens = torch.arange(8, 20)[None]
    assert torch.equal(loaded(input_ids=tokens).logits, stock(input_ids=tokens).logits)


def test_what_transformers_says_about_an_attention_it_lacks_is_told_whole(tokenizer, tmp_path):
    make("gptj").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(Exception) as stock:
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ModelError) as ours:
        load_base_model(str(tmp_path), dtype="float32", device="cpu", attn_implementation="sdpa")
    assert " ".join(str(stock.value).split()) in str(ours.value)


def test_modules_asked_for_by_name_that_cannot_be_adapted_are_refused_with_the_reason():
    with pytest.raises(ModelError, match=f"'out_proj' names 2, such as backbone.layers.0.mixer.out_proj: {REFUSED}"):
        find_targets(make("mamba"), ["in_proj", "out_proj"])
    with pytest.raises(ModelError, match=f"'fc1' names .*: {UNREACHED}; leave it out"):
        find_targets(make("gemma3"), ["fc1"])
    targets = find_targets(make("gemma3"), ["q_proj"])
    assert len(targets.shapes) == 2 and not any("vision" in path for path in targets.shapes)


def test_peft_refuses_what_we_say_it_does():
    from peft.tuners import tuners_utils

    from flexlora.training import targets

    config = SimpleNamespace(peft_type="LORA")
    for kind in targets._REFUSING_MODELS:
        model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        for name in ("out_proj", "conv1d", "in_proj", "x_proj"):
            refused = name in targets._REFUSED_NAMES
            try:
                tuners_utils._check_lora_target_modules_mamba(config, model, name)
            except ValueError:
                assert refused
            else:
                assert not refused
