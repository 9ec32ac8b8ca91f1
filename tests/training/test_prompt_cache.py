import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from flexlora.training import prompt_cache
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.logits import next_logits
from flexlora.training.prompt_cache import read_prompts

LENGTHS = [60, 58, 31, 30, 29, 4, 3]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 259, (length,), generator=generator) for length in LENGTHS]
    width = max(LENGTHS)
    padded = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(width - len(row)), torch.ones_like(row)]) for row in rows])
    return padded, mask


@pytest.fixture
def widths(monkeypatch):
    """Makes passes cheap, and notes how wide those are that are read."""
    seen = []

    def noted(model, input_ids, mask, cache):
        seen.append(tuple(input_ids.shape))
        return next_logits(model, input_ids, mask, cache)

    monkeypatch.setattr(prompt_cache, "PASS_TOKENS", {"cpu": 8})
    monkeypatch.setattr(prompt_cache, "next_logits", noted)
    return seen


def test_parts_give_the_logits_and_the_cache_of_the_whole(talkative, batch, widths):
    with torch.no_grad():
        logits, cache = read_prompts(talkative, *batch)
        expected, whole = next_logits(talkative, *batch, None)
        assert widths == [(2, 60), (3, 31), (2, 4)]
        assert torch.allclose(logits, expected, atol=1e-4)
        # A step further, everything that was cached is looked at.
        token = torch.full((len(LENGTHS), 1), 7)
        mask = torch.cat([batch[1], torch.ones_like(token)], 1)
        further, _ = next_logits(talkative, token, mask, cache)
        expected, _ = next_logits(talkative, token, mask, whole)
    assert torch.allclose(further, expected, atol=1e-4)
    assert cache is not None and whole is not None
    assert cache.get_seq_length() == whole.get_seq_length() == max(LENGTHS) + 1


def test_models_that_cannot_join_caches_read_all_at_once(talkative, batch, widths, monkeypatch):
    monkeypatch.setattr(talkative, "can_join_caches", False)
    with torch.no_grad():
        read_prompts(talkative, *batch)
    assert widths == [(len(LENGTHS), max(LENGTHS))]


@pytest.mark.parametrize("lack", ["can_cache", "can_pad_left", "takes_positions"])
def test_without_positions_cache_or_padding_nothing_is_joined(talkative, monkeypatch, lack):
    monkeypatch.setattr(talkative, lack, False)
    assert not talkative.can_join_caches


def test_a_plain_cache_can_be_joined_and_one_with_a_window_cannot(talkative, tokenizer):
    assert talkative.can_join_caches
    config = MistralConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=4,
    )
    assert not AdaptedModel(MistralForCausalLM(config).eval(), tokenizer).can_join_caches
