import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexlora.adapters.merge_into_base import merge_into_base
from flexlora.adapters.peft_format import AdapterError
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules

TOKENS = torch.tensor([[1, 40, 50, 60, 70, 80], [1, 90, 33, 20, 10, 200]])


def logits(network):
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


@pytest.fixture
def adapter(network, random_adapter):
    shapes = target_modules(network, "all-linear")
    return random_adapter(
        shapes, {path: 1 + (5 * index) % 12 for index, path in enumerate(shapes)}, Scaling("rslora", 3.7)
    )


def test_a_merged_model_computes_what_the_adapted_one_does(make_network, tokenizer, adapter, tmp_path):
    model = AdaptedModel(make_network(), tokenizer)
    model.load(Broadcast(adapter))
    merge_into_base(make_network(), tokenizer, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model.network), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("né")["input_ids"] == tokenizer("né")["input_ids"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    with pytest.raises(AdapterError, match="must be new or empty"):
        merge_into_base(make_network(), tokenizer, adapter, tmp_path / "merged")


def test_merging_into_shared_or_unknown_weights_is_refused(make_network, tokenizer, tmp_path):
    head = {"lm_head": LoraFactors(torch.ones(1, 32), torch.ones(259, 1), 1.0)}
    with pytest.raises(AdapterError, match=r"lm_head: its weight is also model\.embed_tokens\.weight"):
        merge_into_base(make_network(), tokenizer, head, tmp_path / "merged")
    with pytest.raises(AdapterError, match="tail: the base model has no such module"):
        merge_into_base(make_network(), tokenizer, {"tail": head["lm_head"]}, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
