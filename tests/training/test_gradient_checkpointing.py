"""Checkpointing gives the same losses and factors with less memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexlora.data.prompts import EncodedExample
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import AdapterState, Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.linear_modules import ModelError
from flexlora.training.one_client import LocalTraining, train_client

MEASURED = """
import sys, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.logits import answer_losses
def peak():  # Of this program alone; what getrusage says begins at the peak of the process that started it.
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
torch.set_num_threads(1)
torch.manual_seed(0)
network = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=512, num_hidden_layers=12,
    num_attention_heads=2, max_position_embeddings=512))
model = AdaptedModel(network, None, gradient_checkpointing=sys.argv[1] == "on")
shapes = target_modules(network, ("q_proj",))
model.load(Broadcast(model.initial_adapter(dict.fromkeys(shapes, 2), Scaling("constant_alpha", 2.0), 0)))
rows = [[index % 60 for index in range(512)] for _ in range(8)]
before = peak()
with model.dropping_out():
    answer_losses(model, rows, rows, 0).sum().backward()
print(peak() - before)
"""


def trained(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[EncodedExample], checkpointing: bool
) -> tuple[AdapterState, dict[str, float]]:
    model = AdaptedModel(network, tokenizer, gradient_checkpointing=checkpointing)
    shapes = target_modules(network, "all-linear")
    sent = Broadcast(model.initial_adapter(dict.fromkeys(shapes, 3), Scaling("constant_alpha", 6.0), 1))
    return train_client(model, sent, examples, LocalTraining(optimizer="sgd", batch_size=2), 0.1, seed=4)


def test_losses_and_factors_are_those_without_it(
    make_network, tokenizer: PreTrainedTokenizerBase, make_examples
) -> None:
    plain, plain_metrics = trained(make_network(), tokenizer, make_examples(8), False)
    again, metrics = trained(make_network(), tokenizer, make_examples(8), True)
    for name in ("loss", "first_loss", "last_loss"):
        assert metrics[name] == pytest.approx(plain_metrics[name], abs=1e-6)
    for path, own in plain.items():
        torch.testing.assert_close(again[path].A, own.A, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[path].B, own.B, rtol=1e-5, atol=1e-6)


def test_the_network_is_in_evaluation_mode_again_after_training(
    make_network, tokenizer: PreTrainedTokenizerBase, make_examples
) -> None:
    network = make_network()
    trained(network, tokenizer, make_examples(4), True)
    assert not network.training


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_it_takes_less_memory(tmp_path: Path) -> None:
    """A block keeps its input alone: measured 3 to 5 times less, which the bound leaves room for."""
    peaks = {}
    for mode in ("on", "off"):
        done = subprocess.run([sys.executable, "-c", MEASURED, mode], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks[mode] = int(done.stdout)
    assert peaks["on"] < 0.6 * peaks["off"], peaks


def test_an_architecture_without_it_is_named(
    make_network, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network()
    monkeypatch.setattr(type(network), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"cannot be checkpointed; set model.gradient_checkpointing=false"):
        AdaptedModel(network, tokenizer, gradient_checkpointing=True)
