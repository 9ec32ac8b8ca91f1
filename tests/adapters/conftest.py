"""Small models, adapters that stock PEFT saved of them, and what tests of several files ask of these."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import AdapterError

TOKENS = torch.tensor([[1, 40, 50, 60, 17, 23], [1, 33, 20, 10, 44, 5]])
ATTENTION = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Save = Callable[..., Path]


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=TOKENS).logits


def loaded(network: PreTrainedModel, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(network), folder).eval()


def lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def deltas(network: PreTrainedModel, folder: Path) -> dict[str, np.ndarray]:
    """The dense change of every module in float64, with PEFT as the authority on which scaling is whose."""
    changes = {}
    for path, layer in lora_layers(loaded(network, folder)).items():
        if "default" in layer.lora_A:
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        else:
            A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        A, B = (factor.detach().to(torch.float64).numpy() for factor in (A, B))
        changes[path] = layer.scaling["default"] * (B @ A)
    return changes


def dense_sum(changes: Sequence[Mapping[str, np.ndarray]], weights: Sequence[float]) -> dict[str, np.ndarray]:
    total: dict[str, np.ndarray] = {}
    for change, weight in zip(changes, weights, strict=True):
        for path, matrix in change.items():
            total[path] = total.get(path, 0.0) + weight * matrix
    return total


def assert_same_changes(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], rtol: float = 1e-6
) -> None:
    assert actual.keys() == expected.keys()
    for path, matrix in expected.items():
        assert np.linalg.norm(actual[path] - matrix) <= rtol * np.linalg.norm(matrix), path


def rewrite(folder: Path, **changes: object) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "adapter_config.json").read_text())


def assert_refused(folders: Sequence[Path], match: str, **options: object) -> None:
    """One clear line per bad adapter, and nothing written."""
    parent = folders[0].parent
    before = sorted(parent.rglob("*"))
    with pytest.raises(AdapterError, match=match) as caught:
        merge(folders, out=parent / "refused", **options)
    assert "\n" not in str(caught.value)
    assert sorted(parent.rglob("*")) == before


@pytest.fixture(scope="session", name="logits")
def logits_fixture() -> Callable[..., Any]:
    return logits


@pytest.fixture(scope="session", name="loaded")
def loaded_fixture() -> Callable[..., Any]:
    return loaded


@pytest.fixture(scope="session", name="lora_layers")
def lora_layers_fixture() -> Callable[..., Any]:
    return lora_layers


@pytest.fixture(scope="session", name="deltas")
def deltas_fixture() -> Callable[..., Any]:
    return deltas


@pytest.fixture(scope="session", name="dense_sum")
def dense_sum_fixture() -> Callable[..., Any]:
    return dense_sum


@pytest.fixture(scope="session", name="assert_same_changes")
def assert_same_changes_fixture() -> Callable[..., Any]:
    return assert_same_changes


@pytest.fixture(scope="session", name="rewrite")
def rewrite_fixture() -> Callable[..., Any]:
    return rewrite


@pytest.fixture(scope="session", name="config_of")
def config_of_fixture() -> Callable[..., Any]:
    return config_of


@pytest.fixture(scope="session", name="assert_refused")
def assert_refused_fixture() -> Callable[..., Any]:
    return assert_refused


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Returns a function that saves a random adapter with stock PEFT; both factors are random."""
    counter = iter(range(1000))

    def make(
        network: PreTrainedModel,
        *,
        dtype: torch.dtype = torch.float32,
        embeddings: bool = False,
        std: float = 0.05,
        **config: object,
    ) -> Path:
        number = next(counter)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = get_peft_model(
                copy.deepcopy(network), LoraConfig(init_lora_weights=config.pop("init_lora_weights", True), **config)
            )
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=std)
        folder = tmp_path / f"adapter-{number}"
        model.to(dtype).save_pretrained(folder, save_embedding_layers=embeddings)
        return folder

    return make


@pytest.fixture
def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2, initializer_range=0.2)
    config.bos_token_id = config.eos_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


@pytest.fixture
def deep() -> PreTrainedModel:
    """Twelve layers, so that layer 1 and layer 11 both exist."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=12, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def llava() -> PreTrainedModel:
    """A language and a vision model whose attention has one shape."""
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=64, initializer_range=0.2, **size)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
        return LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def mixed(network: PreTrainedModel, save: Save) -> list[Path]:
    """Ranks, alphas, rsLoRA, patterns and target modules all differ."""
    return [
        save(network, r=4, lora_alpha=12, target_modules=ATTENTION),
        save(
            network,
            r=3,
            lora_alpha=16,
            use_rslora=True,
            target_modules=EVERYTHING,
            rank_pattern={"layers.1.mlp.down_proj": 7},
            alpha_pattern={"down_proj": 5, r"model\.layers\.0\..*": 9},
        ),
        save(network, r=9, lora_alpha=2, target_modules=r".*layers\.1\.(self_attn|mlp)\.[qud]\w*_proj"),
    ]


@pytest.fixture
def plain(network: PreTrainedModel, save: Save) -> Path:
    return save(network, r=2, target_modules=ATTENTION)
