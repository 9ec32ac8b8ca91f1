import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from flexlora.training.probes import has_dropout, separate_head, takes_positions

SIZES = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_a_head_that_alone_makes_logits_is_found(network):
    assert separate_head(network) is network.lm_head


def test_a_head_whose_output_is_changed_afterwards_is_not(network):
    network.register_forward_hook(lambda module, inputs, output: output.__setitem__("logits", 2 * output.logits))
    assert separate_head(network) is None


@pytest.mark.parametrize(("rate", "found"), [(0.1, True), (0.0, False)])
def test_dropout_is_found_in_settings_and_modules(rate, found):
    gpt = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, resid_pdrop=rate, attn_pdrop=0.0, embd_pdrop=0.0)
    )
    assert has_dropout(gpt) is found
    gpt.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.5), gpt.lm_head)
    assert has_dropout(gpt)


def test_dropout_of_a_classifier_that_a_causal_model_lacks_does_not_count():
    pythia = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))
    assert pythia.config.classifier_dropout > 0
    assert not has_dropout(pythia)


def test_a_network_that_takes_positions_says_so_in_its_signature(network):
    assert takes_positions(network)
