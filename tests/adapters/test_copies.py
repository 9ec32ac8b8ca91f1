"""Whole weights beside factors: stock PEFT loads what is written for every mixture of copies and factors."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flexlora.adapters.copies import is_same_weight
from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import MergeError

EMBEDDING, UNDER = (f"base_model.model.model.embed_tokens.{end}weight" for end in ("", "base_layer."))
Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")


def copies_in(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key: tensor for key, tensor in tensors.items() if "lora_" not in key}


def edit(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Replace tensors, None takes one out; ``plain`` and ``under`` are the two keys of the embedding."""
    path = folder / "adapter_model.safetensors"
    keys = {"plain": EMBEDDING, "under": UNDER}
    tensors = load_file(path) | {keys[name]: tensor for name, tensor in changes.items()}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path, metadata={"format": "pt"})
    return folder


@pytest.fixture
def untied() -> PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=259, initializer_range=0.2, **size)).eval()


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(6), repeat=2)))
def test_every_mixture_of_copies_and_factors_loads(
    untied: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    first: int,
    second: int,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
    loaded: Helper,
) -> None:
    weight = untied.get_input_embeddings().weight.detach()

    def adapter(kind: int) -> Path:
        targets = ["q_proj", "embed_tokens"] if kind >= 3 else ["q_proj"]
        folder = save(untied, r=2 + kind, target_modules=targets, embeddings=kind % 3 > 0)
        if kind == 2:
            edit(folder, plain=None, under=weight.clone())  # under factors that this one lacks
        if kind == 5:
            edit(folder, plain=weight.clone())  # at both places
        return folder

    folders = [adapter(first), adapter(second)]
    merge(folders, exact=True, out=tmp_path / "out")
    found = copies_in(tmp_path / "out")
    has_copy, has_factors = any(kind % 3 for kind in (first, second)), any(kind >= 3 for kind in (first, second))
    key = UNDER if has_factors else EMBEDDING
    assert {key for key in found if "embed_tokens" in key} == ({key} if has_copy else set())
    if has_copy:
        assert torch.equal(found[key], weight)
        # A base whose embedding differs gets the one that is stored.
        other = LlamaForCausalLM(untied.config)
        model = loaded(other, tmp_path / "out")
        layer = model.get_submodule("base_model.model.model.embed_tokens")
        assert torch.equal(layer.base_layer.weight if has_factors else layer.weight, weight)
    for number, folder in enumerate(folders):
        if (first, second)[number] in (2, 5):
            edit(folder, plain=None, under=None)
    expected = dense_sum([deltas(untied, folder) for folder in folders], (0.5, 0.5))
    assert_same_changes(deltas(untied, tmp_path / "out"), expected)


@pytest.mark.parametrize("places", [("plain", "plain"), ("plain", "under"), ("under", "plain"), ("under", "under")])
def test_copies_that_differ_are_refused_wherever_they_lie(
    untied: PreTrainedModel, save: Save, places: tuple[str, str], assert_refused: Check
) -> None:
    weight = untied.get_input_embeddings().weight.detach()
    folders = [save(untied, r=2, target_modules=["q_proj", "embed_tokens"]) for _ in places]
    for number, (folder, place) in enumerate(zip(folders, places, strict=True)):
        edit(folder, **{place: weight + number})
    assert_refused(folders, r"embed_tokens is saved whole .*adapter-0 and .*adapter-1 hold different weights")
    edit(folders[0], plain=weight.clone(), under=weight + 1)
    assert_refused(folders[:1], "adapter-0 and .*adapter-0 hold different weights")


def test_rows_that_do_not_fit_the_factors_are_refused(
    untied: PreTrainedModel, save: Save, assert_refused: Check
) -> None:
    with_factors = save(untied, r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    resized = edit(save(untied, r=2, target_modules=["q_proj"]), plain=torch.ones(262, 32))
    assert_refused(
        [with_factors, resized],
        "embed_tokens must have one shape .*adapter-1 holds it whole with 262x32 and .*adapter-0 has factors for "
        "259x32",
    )
    other = edit(save(untied, r=2, target_modules=["q_proj"]), plain=torch.ones(259, 32))
    assert_refused([resized, other], "adapter-1 and .*adapter-2 hold different weights")
    assert_refused([edit(with_factors, under=torch.ones(262, 32))], "holds it whole with 262x32")


@pytest.mark.parametrize("types", list(itertools.permutations(["float32", "bfloat16", "float16"], 2)), ids="-".join)
def test_copies_that_are_equal_but_for_precision_are_one(
    untied: PreTrainedModel, save: Save, tmp_path: Path, types: tuple[str, str]
) -> None:
    weight = untied.get_input_embeddings().weight.detach()
    rounded = [weight.to(getattr(torch, dtype)) for dtype in types]
    folders = [edit(save(untied, r=2, target_modules=["q_proj"]), plain=copy) for copy in rounded]
    merge(folders, out=tmp_path / "out")
    finest = min(rounded, key=lambda copy: float((copy.float() - weight).abs().max()))
    assert torch.equal(copies_in(tmp_path / "out")[EMBEDDING], finest)
    edit(folders[0], plain=rounded[0] * 1.05)
    with pytest.raises(MergeError, match="hold different weights"):
        merge(folders, out=tmp_path / "different")


def test_precision_is_that_of_the_numbers_and_not_of_the_type() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=generator)
    once_rounded = weight.bfloat16().float()
    assert is_same_weight(weight, once_rounded) and is_same_weight(once_rounded, weight.half())
    assert is_same_weight(weight * 1e-6, (weight * 1e-6).half())  # below the normal numbers of float16
    trained = weight.clone()
    trained[3, 4] += 1e-6
    assert not is_same_weight(weight, trained)
    assert not is_same_weight(weight.bfloat16(), (weight * 1.02).bfloat16())
    assert not is_same_weight(weight, weight[:-1])
