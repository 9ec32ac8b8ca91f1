"""Tensors that are no factors of linear modules or embeddings are refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

EMBEDDING = "base_model.model.model.embed_tokens.weight"
Check = Callable[..., None]


def saved_from(module: torch.nn.Module, folder: Path, **config: object) -> Path:
    get_peft_model(module, LoraConfig(r=2, **config)).save_pretrained(folder)
    return folder


class Bag(torch.nn.Module):
    """Layers that are no linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3)
        self.sequence = torch.nn.Conv1d(4, 6, 3)
        self.attention = torch.nn.MultiheadAttention(8, 2)
        self.mixture = torch.nn.Module()
        self.mixture.experts = torch.nn.Parameter(torch.ones(3, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_modules": ["conv"]}, "conv is LoRA on a convolution"),
        ({"target_modules": ["sequence"]}, "sequence is LoRA on a convolution"),
        ({"target_modules": ["attention"]}, "LoRA inside a layer with LoRA, as on nn.MultiheadAttention"),
        (
            {"target_modules": [], "target_parameters": ["mixture.experts"]},
            "target_parameters: factors of stacked experts",
        ),
    ],
    ids=["conv2d", "conv1d", "attention", "experts"],
)
def test_layers_that_are_not_linear_are_refused(
    tmp_path: Path, config: dict[str, object], match: str, assert_refused: Check
) -> None:
    assert_refused([saved_from(Bag(), tmp_path / "bag", **config)], match)


@pytest.mark.parametrize(
    ("A", "B", "match"),
    [
        ((3, 2, 8), (3, 6, 2), "q_proj holds the stacked factors of 3 experts, which are not handled; merge it into"),
        ((2, 8, 3), (6, 2, 1), "q_proj is LoRA on a convolution"),
        ((2, 8, 3, 3), (6, 2, 1, 1), "q_proj is LoRA on a convolution"),
        # One expert of rank 1, or a convolution: the shapes do not tell.
        ((3, 1, 8), (3, 3, 1), r"q_proj has factors \(3, 3, 1\) and \(3, 1, 8\), which are no matrices"),
        ((2, 8, 3), (6, 2), r"q_proj has factors \(6, 2\) and \(2, 8, 3\), which are no matrices"),
    ],
)
def test_a_cause_is_named_only_where_shapes_leave_no_doubt(
    plain: Path, A: tuple[int, ...], B: tuple[int, ...], match: str, assert_refused: Check
) -> None:
    path = plain / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(load_file(path) | {key.format("A"): torch.ones(A), key.format("B"): torch.ones(B)}, path)
    assert_refused([plain], match)


def test_factors_of_stacked_experts_in_two_axes_are_called_so(plain: Path, assert_refused: Check) -> None:
    path = plain / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    save_file(load_file(path) | {key.format("A"): torch.ones(6, 8), key.format("B"): torch.ones(4, 6)}, path)
    assert_refused([plain], "experts has factors of rank 6, but .* says 2, as if 3 experts were stacked")


def test_tensors_that_are_no_pair_of_matrices_are_refused(plain: Path, assert_refused: Check) -> None:
    path = plain / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changes, match in (
        ({key: None}, r"layers\.0\.self_attn\.q_proj must have both lora_A and lora_B; one is missing"),
        ({key: torch.zeros(0, 32)}, r"has factors \(32, 2\) and \(0, 32\), not a product"),
        ({key: torch.zeros(32)}, "not a product; was it saved from one shard"),
        ({key: torch.zeros(3, 32)}, "not a product"),
        (
            {"base_model.model.model.norm.weight": torch.ones(32)},
            "holds .*norm.weight: whole weights were trained beside",
        ),
        ({"base_model.model.score.weight": torch.ones(2, 32)}, "holds .*score.weight: whole weights were trained"),
        ({key.replace("lora_A", "base_layer"): torch.ones(32, 32)}, "base_layer.weight: whole weights were trained"),
        ({key.replace("q_proj.lora_A", "k_proj"): torch.ones(32, 32)}, "k_proj.weight: whole weights were trained"),
        ({EMBEDDING: torch.zeros(3, 3, dtype=torch.int8)}, r"must be a matrix stored in .*; got I8 of shape \[3, 3\]"),
        ({EMBEDDING: torch.zeros(3, 3, dtype=torch.bool)}, "must be a matrix stored in .*; got BOOL"),
        ({EMBEDDING: torch.zeros(3, 3, dtype=torch.complex64)}, "must be a matrix stored in .*; got C64"),
        ({EMBEDDING: torch.tensor(1.5)}, r"must be a matrix stored in .*; got F32 of shape \[\]"),
        ({EMBEDDING: torch.zeros(0, 3)}, r"must be a matrix stored in .*; got F32 of shape \[0, 3\]"),
        ({EMBEDDING: torch.full((3, 3), torch.nan)}, "embed_tokens.weight must be finite; it holds NaN or infinity"),
        ({key: torch.zeros(2, 32, dtype=torch.int8)}, "must be stored in BF16, F16, F32, F64; got I8"),
        (
            {"base_model.model.x.lora_magnitude_vector": torch.ones(2)},
            "_magnitude_vector: DoRA rescales the columns",
        ),
        ({"base_model.model.x.somebodys_own": torch.ones(2)}, "only LoRA factors of linear modules and embeddings can"),
        ({"q_proj.weight": torch.ones(2)}, "found q_proj.weight"),
        ({key.replace("weight", "default.weight"): torch.ones(2, 32)}, "under the names that PEFT's save_pretrained"),
        ({key.removeprefix("base_model.model."): torch.ones(2, 32)}, "under the names that PEFT's save_pretrained"),
        ({key.replace("lora_A.weight", "lora_embedding_A"): torch.ones(2, 32)}, "linear module and of an embedding"),
    ):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        save_file(changed, path)
        assert_refused([plain], match)
    save_file({}, path)
    assert_refused([plain], "holds no factors")
