"""Bases of 8 and 4 bits train, and what they cannot do is said."""

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from flexlora.adapters.rank_layout import RankLayout
from flexlora.data.prompts import EncodedExample
from flexlora.engines.base import Parcel, RoundOrder
from flexlora.engines.simulation import SimulationEngine
from flexlora.experiment.config import ConfigError
from flexlora.experiment.config_file import parse_config
from flexlora.experiment.export_request import check_export
from flexlora.experiment.run_folder import ExperimentError
from flexlora.federation.clients import ClientSpec, RankPlan
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_digest import base_digest
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.linear_modules import ModelError
from flexlora.training.one_client import LocalTraining
from flexlora.training.quantized_base import quantization_config

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs the extra flexlora[bitsandbytes]")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return a random Llama whose widths are whole blocks of quantised weights."""
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def examples(tokenizer: PreTrainedTokenizerBase) -> list[EncodedExample]:
    found = []
    for number in range(8):
        ids = tokenizer(f"question {number}: answer {number % 3}")["input_ids"]
        found.append(EncodedExample(tuple(ids), tuple([-100] * 4 + ids[4:])))
    return found


def loaded(base: Path, quantization: Literal["8bit", "4bit"] | None = None) -> PreTrainedModel:
    return load_base_model(str(base), dtype="float32", device="cpu", quantization=quantization)[0]


def trained(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[AdaptedModel, Update]:
    """Return the base and what a client of rank 4 returns after a round on it."""
    model = AdaptedModel(network, tokenizer)
    shapes = target_modules(network, "all-linear")
    sent = Broadcast(model.initial_adapter(dict.fromkeys(shapes, 4), Scaling("constant_alpha", 8.0), 0))
    plan = RankPlan("four", (("", 4),))
    order = RoundOrder(1, 0, 0.5, "float32", (), [ClientSpec("north", plan, 8)], {plan: Parcel(sent, "float32")})
    settings = LocalTraining(optimizer="sgd", batch_size=4, num_epochs=3.0)
    (outcome,) = SimulationEngine(model, lambda _: examples(tokenizer), settings).train(order)
    assert isinstance(outcome, Update), outcome
    return model, outcome


def change_of(update: Update) -> np.ndarray:
    return np.concatenate([own.delta().numpy().ravel() for _, own in sorted(update.payload.items())])


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_four_bits_train_as_a_whole_base_of_the_same_rounded_weights_does(
    base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    quantized, whole = loaded(base, "4bit"), loaded(base)
    num_parameters = AdaptedModel(loaded(base), tokenizer).num_parameters
    stored = 0
    for path, module in quantized.named_modules():
        if type(module).__name__ == "Linear4bit":
            weight = module.weight
            stored += weight.numel() * weight.element_size()
            rounded = dequantize_4bit(weight.data, weight.quant_state)
            # NF4 moves every weight, none of them far.
            exact = whole.get_submodule(path).weight
            assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.15
            exact.data = rounded.to(torch.float32).contiguous()
    assert stored == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) // 2
    model, update = trained(quantized, tokenizer)
    _, expected = trained(whole, tokenizer)
    assert model.num_parameters == num_parameters
    assert update.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
    ours, theirs = change_of(update), change_of(expected)
    assert np.linalg.norm(theirs) > 0.01
    assert np.linalg.norm(ours - theirs) < 1e-2 * np.linalg.norm(theirs)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_eight_bits_train_almost_as_whole_weights_do(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model, update = trained(loaded(base, "8bit"), tokenizer)
    _, expected = trained(loaded(base), tokenizer)
    assert model.network.get_submodule("model.layers.0.mlp.up_proj").get_base_layer().weight.dtype == torch.int8
    assert update.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=0.01)
    ours, theirs = change_of(update), change_of(expected)
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.95


@needs_bitsandbytes
def test_the_digest_is_that_of_the_stored_weights_however_they_are_loaded(base: Path, tmp_path: Path) -> None:
    before = base_digest(str(base))
    network, tokenizer = load_base_model(str(base), dtype="float32", device="cpu")
    network.save_pretrained(tmp_path / "parts", max_shard_size="60kB")
    tokenizer.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert base_digest(str(tmp_path / "parts")) == before == base_digest(str(base), "bfloat16")


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"model.quantization=4bit needs bitsandbytes and accelerate; pip install"):
        quantization_config("4bit", torch.float32)


def test_processes_cannot_share_quantised_weights_and_nothing_merges_into_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.quantization=8bit stores weights that processes cannot share"):
        parse_config({"model": {"quantization": "8bit", "num_processes": 2}}, "the test")
    config = parse_config({"model": {"quantization": "4bit"}}, "the test")
    with pytest.raises(ExperimentError, match="a base of 4bit weights"):
        check_export(config, tmp_path, tmp_path / "out", rank=None, merged=True, layout=RankLayout(), push_to_hub=None)
