import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.factor_bank import FactorBank
from flexlora.training.group_layers import BankRows, RowMasks, reason_against_groups


def test_masks_keep_as_many_as_they_should_and_scale_what_is_kept():
    masks = RowMasks(0.2, [1, 2, 1], [300, 300, 100], torch.device("cpu"))
    first, second = masks.draw(torch.ones(3, 300, 32)), masks.draw(torch.ones(3, 300, 32))
    assert set(first.unique().tolist()) == {0.0, 1.25}
    assert first[:2].mean() == pytest.approx(1.0, abs=0.02)
    assert first[2, 100:].abs().sum() == 0
    assert torch.equal(first[0, :100], first[2, :100])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


def test_networks_that_clients_cannot_share_say_why(make_network, tokenizer):
    llama = make_network()
    paths = target_modules(llama, "all-linear")
    assert reason_against_groups(llama, paths, base_drops_out=False) is None
    assert "dropout of its own" in reason_against_groups(llama, paths, base_drops_out=True)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    pythia = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    assert pythia.config.classifier_dropout > 0
    assert not AdaptedModel(pythia, tokenizer).base_drops_out
    opt = OPTForCausalLM(OPTConfig(vocab_size=40, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2))
    assert "does not see the rows" in reason_against_groups(
        opt, target_modules(opt, "all-linear"), base_drops_out=False
    )
    assert "Conv1D" in reason_against_groups(gpt, target_modules(gpt, "all-linear"), base_drops_out=False)


def test_scalings_are_not_rounded_to_the_type_of_the_base(model, make_broadcast):
    adapter = make_broadcast(3, rule=Scaling("constant_alpha", 16.0)).trainable
    bank = FactorBank({path: (3, own.shape[1], own.shape[0]) for path, own in adapter.items()}, "both", model.device)
    slot = bank.enter(adapter)
    A, B, scaling = BankRows(bank, slice(0, 1), slice(slot, slot + 1), 1).factors(next(iter(adapter)), torch.bfloat16)
    assert A.dtype == B.dtype == torch.bfloat16
    assert float(scaling) == np.float32(16 / 3)
