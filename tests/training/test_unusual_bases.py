"""Bases that keep states of their own, or take no cache, are answered with what transformers computes without one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model, load_empty_model, target_modules
from flexlora.training.generation import generate
from flexlora.training.linear_modules import ModelError
from flexlora.training.logits import answer_losses
from flexlora.training.probes import can_cache, can_pad_left, is_causal

ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **ENDS,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**PLAIN),
    "minimax": lambda: transformers.MiniMaxConfig(
        **PLAIN,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"],
        block_size=8,
    ),
    "recurrent gemma": lambda: transformers.RecurrentGemmaConfig(
        **{**PLAIN, "num_hidden_layers": 3}, lru_width=32, attention_window_size=16
    ),
    "rwkv": lambda: transformers.RwkvConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64, **ENDS
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=300,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        **ENDS,
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4, **ENDS
    ),
}
BOTH_WAYS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**{k: v for k, v in PLAIN.items() if k != "num_key_value_heads"}),
    "xlnet": lambda: transformers.XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48, **ENDS),
}
PROMPTS = [[5, 9, 40], [7, 8, 9, 10, 11], [30, 31, 32, 33]]


def network_of(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).eval()
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@torch.no_grad()
def continued(network: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    """All tokens anew at each step: no padding, no cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + num_new:
        logits = network(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        if int(logits.argmax()) == 2:
            break
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_the_network_alone_without_cache_and_padding(name, tokenizer):
    network = network_of(CONFIGS[name]())
    expected = [continued(network, prompt, 5) for prompt in PROMPTS]
    model = AdaptedModel(network, tokenizer)
    assert generate(model, PROMPTS, 5) == expected
    assert [generate(model, [prompt], 5)[0] for prompt in PROMPTS] == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_transformers(name, tokenizer):
    network = network_of(CONFIGS[name]())
    rows = [[5, 9, 40, 41], [7, 8, 9, 10, 11, 12]]
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1]
        expected.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum"))
    model = AdaptedModel(network, tokenizer)
    shapes = target_modules(network, "all-linear")
    model.load(Broadcast(model.initial_adapter(dict.fromkeys(shapes, 2), Scaling("constant_alpha", 2.0), 0)))
    losses = answer_losses(model, rows, rows, padding=0)
    torch.testing.assert_close(losses.detach(), torch.stack(expected), atol=1e-4, rtol=1e-4)
    losses.sum().backward()
    assert any(bool(p.grad is not None and p.grad.abs().max() > 0) for p in model.trained_parameters())


def test_what_a_network_can_do_is_tried():
    llama, rwkv, minimax = (network_of(CONFIGS[name]()) for name in ("llama", "rwkv", "minimax"))
    assert can_cache(llama) and can_pad_left(llama, with_cache=True) and can_pad_left(llama, with_cache=False)
    assert not can_cache(rwkv)
    assert not can_pad_left(minimax, with_cache=True)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_model_that_sees_what_follows_is_refused(name, tokenizer, tmp_path):
    network = network_of(BOTH_WAYS[name]())
    assert not is_causal(network)
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="must be a causal language model, in which no token sees what follows it"):
        load_base_model(str(tmp_path), dtype="float32", device="cpu")


def test_an_architecture_of_another_kind_is_named(tokenizer, tmp_path):
    config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for load in (load_empty_model, lambda name: load_base_model(name, dtype="float32", device="cpu")):
        with pytest.raises(ModelError, match="has a T5Config, which transformers cannot load as one: name a decoder"):
            load(str(tmp_path))
