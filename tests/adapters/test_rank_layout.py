"""What is written needs no pattern: as PEFT, its hotswap and readers with one alpha read it, it is one function."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from transformers import PreTrainedModel

from flexlora.adapters.laid_out import fresh_rows
from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.rank_layout import SERVED_RANKS, RankLayout
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling
from flexlora.training.base_model import target_modules

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
UINT32 = range(2**32)
Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]
SCALINGS = [
    Scaling("rslora", 5.65685424949238),
    Scaling("constant_alpha", 16.0),
    Scaling("constant_ratio", 2.0),
    Scaling("constant_alpha", -3.0),
    Scaling("constant_ratio", 1e-7),
]


def with_one_alpha(folder: Path) -> dict[str, np.ndarray]:
    """The changes as llama.cpp's converter reads them: one ``lora_alpha``, the rank of each tensor, no pattern."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    changes = {}
    for key, A in tensors.items():
        if "lora_A" in key:
            B = tensors[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            changes[path] = config["lora_alpha"] / A.shape[0] * (B.astype(np.float64) @ A)
    return changes


def with_one_rank(folder: Path) -> dict[str, np.ndarray]:
    """The changes as servers read them that take ``lora_alpha / r`` of the configuration for every module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {A.shape[0] for key, A in tensors.items() if "lora_A" in key} == {config["r"]}
    return with_one_alpha(folder)


def assert_served_by_vllm(folder: Path, rank: int) -> None:
    """Its rules for an adapter (``PEFTHelper.validate_legal``) and for a model in which this rank has room."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] <= min(served for served in VLLM_RANKS if served >= rank)
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]


@pytest.fixture
def shapes(network: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return target_modules(network, "all-linear")


def mixed_adapter(random_adapter: Helper, shapes: Mapping[str, tuple[int, int]], scaling: Scaling) -> AdapterState:
    return random_adapter(shapes, {path: 1 + (5 * index) % 12 for index, path in enumerate(shapes)}, scaling)


def dense(network: PreTrainedModel, changes: Mapping[str, np.ndarray]) -> PreTrainedModel:
    changed = copy.deepcopy(network)
    with torch.no_grad():
        for path, change in changes.items():
            changed.get_submodule(path).weight += torch.from_numpy(change).float()
    return changed


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: f"{scaling.policy}-{scaling.lora_alpha:g}")
@pytest.mark.parametrize("layout", ["uniform", "exact"])
def test_every_reader_finds_the_same_change(
    network: PreTrainedModel,
    shapes: dict[str, tuple[int, int]],
    random_adapter: Helper,
    scaling: Scaling,
    layout: str,
    tmp_path: Path,
    deltas: Helper,
    config_of: Helper,
    assert_same_changes: Check,
) -> None:
    adapter = mixed_adapter(random_adapter, shapes, scaling)
    expected = {path: factors.delta().numpy() for path, factors in adapter.items()}
    options = {} if layout == "uniform" else {"ranks": layout}
    write_adapter(tmp_path / "out", adapter, "base", **options)
    config = config_of(tmp_path / "out")
    assert type(config["lora_alpha"]) is int and config["lora_alpha"] in UINT32
    assert config["alpha_pattern"] == {}
    assert_same_changes(deltas(network, tmp_path / "out"), expected)
    assert_same_changes(with_one_alpha(tmp_path / "out"), expected)
    if layout == "uniform":
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (12, 12, {})
        assert_same_changes(with_one_rank(tmp_path / "out"), expected)
        assert_served_by_vllm(tmp_path / "out", 12)
    else:
        assert len(config["rank_pattern"]) > 5


@pytest.mark.parametrize("choice", [{}, {"energy": 0.9}, {"exact": True}, {"rank": 4}], ids=str)
@pytest.mark.parametrize("layout", ["uniform", "exact"])
def test_every_reader_finds_the_same_merge(
    network: PreTrainedModel,
    mixed: list[Path],
    choice: dict[str, object],
    layout: str,
    tmp_path: Path,
    deltas: Helper,
    config_of: Helper,
    assert_same_changes: Check,
) -> None:
    merge(mixed, ranks=layout, out=tmp_path / "out", **choice)
    config, changes = config_of(tmp_path / "out"), deltas(network, tmp_path / "out")
    assert config["alpha_pattern"] == {} and type(config["lora_alpha"]) is int
    assert_same_changes(with_one_alpha(tmp_path / "out"), changes)
    if layout == "uniform":
        assert config["rank_pattern"] == {} and config["lora_alpha"] == config["r"]
        assert_same_changes(with_one_rank(tmp_path / "out"), changes)
    # The same merge either way.
    merge(mixed, ranks="exact" if layout == "uniform" else "uniform", out=tmp_path / "other", **choice)
    assert_same_changes(deltas(network, tmp_path / "other"), changes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_one_alpha_and_rounds_once(
    network: PreTrainedModel, mixed: list[Path], dtype: str, tmp_path: Path, deltas: Helper, assert_same_changes: Check
) -> None:
    merge(mixed, energy=0.9, out=tmp_path / "wide")
    expected = deltas(network, tmp_path / "wide")
    for layout in ("uniform", "exact"):
        merge(mixed, energy=0.9, dtype=dtype, ranks=layout, out=tmp_path / layout)
        tensors = load_torch_file(tmp_path / layout / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
        assert_same_changes(deltas(network, tmp_path / layout), expected, rtol=0.006 if dtype == "bfloat16" else 1e-3)


def test_merged_into_the_base_by_stock_peft_it_is_the_dense_sum(
    network: PreTrainedModel,
    shapes: dict[str, tuple[int, int]],
    random_adapter: Helper,
    tmp_path: Path,
    logits: Helper,
    loaded: Helper,
) -> None:
    adapter = mixed_adapter(random_adapter, shapes, Scaling("rslora", 0.7))
    expected = logits(dense(network, {path: factors.delta().numpy() for path, factors in adapter.items()}))
    for layout in ("uniform", "exact"):
        write_adapter(tmp_path / layout, adapter, "base", ranks=layout)
        merged = loaded(network, tmp_path / layout).merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("their_rank", [3, 12, 20])
@pytest.mark.parametrize("ours_first", [True, False])
def test_hotswap_of_stock_peft_changes_ours_for_theirs_and_back(
    network: PreTrainedModel,
    save: Save,
    shapes: dict[str, tuple[int, int]],
    random_adapter: Helper,
    their_rank: int,
    ours_first: bool,
    tmp_path: Path,
    logits: Helper,
    loaded: Helper,
) -> None:
    adapter = mixed_adapter(random_adapter, shapes, Scaling("rslora", 0.7))
    write_adapter(tmp_path / "ours", adapter, "base")
    theirs = save(network, r=their_rank, lora_alpha=5, target_modules=EVERYTHING, std=0.2)
    by_hand = dense(network, {path: factors.delta().numpy() for path, factors in adapter.items()})
    expected = {tmp_path / "ours": logits(by_hand), theirs: logits(loaded(network, theirs))}
    first, second = (tmp_path / "ours", theirs) if ours_first else (theirs, tmp_path / "ours")
    model: PeftModel = loaded(network, first)
    for folder in (second, first, second):
        hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(logits(model), expected[folder], rtol=1e-3, atol=1e-3)


def test_the_directions_that_are_added_change_nothing_and_learn(
    network: PreTrainedModel,
    shapes: dict[str, tuple[int, int]],
    random_adapter: Helper,
    tmp_path: Path,
    lora_layers: Helper,
) -> None:
    adapter = mixed_adapter(random_adapter, shapes, Scaling("constant_alpha", 1.0))
    write_adapter(tmp_path / "out", adapter, "base", pad_to=16)
    model = PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "out", is_trainable=True)
    layers = lora_layers(model)
    for path, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        own = adapter[path].rank
        assert A.shape[0] == 16
        assert not B[:, own:].any() and A[own:].any(dim=1).all()
        assert torch.linalg.matrix_rank(A.double()) == min(A.shape)
    tokens = torch.tensor([[1, 40, 50, 60, 17, 23]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    for path, layer in layers.items():
        gradient = layer.lora_B["default"].weight.grad
        assert gradient[:, adapter[path].rank :].any(dim=0).all(), path


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_embeddings_are_padded_too(
    network: PreTrainedModel, save: Save, tmp_path: Path, deltas: Helper, assert_same_changes: Check
) -> None:
    config = {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 2}, "lora_alpha": 7}
    folder = save(network, r=5, std=0.2, **config)
    merge([folder], pad_to=8, out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (8, 259)
    assert_same_changes(deltas(network, tmp_path / "out"), deltas(network, folder))


@pytest.mark.parametrize("pad_to", VLLM_RANKS)
def test_what_is_padded_to_a_rank_has_that_rank_and_nothing_else_changes(pad_to: int, tmp_path: Path) -> None:
    adapter = {"a": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 0.3)}
    write_adapter(tmp_path / "out", adapter, "base", pad_to=pad_to)
    np.testing.assert_allclose(with_one_rank(tmp_path / "out")["a"], np.full((2, 3), 0.3), rtol=1e-6)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == pad_to and (pad_to == 1 or config["lora_alpha"] == pad_to)


def test_ranks_that_cannot_be_padded_to_are_refused_with_what_can(plain: Path, mixed: list[Path]) -> None:
    assert SERVED_RANKS == VLLM_RANKS
    out = plain.parent / "refused"
    for options, match in (
        ({"pad_to": 12}, "pad_to must be a rank that vLLM makes room for, one of 1, 8, 16, .*512; got 12"),
        ({"pad_to": True}, "got True"),
        ({"pad_to": np.True_}, "pad_to must be a rank that vLLM makes room for"),
        ({"pad_to": 16.0}, "pad_to must be a rank that vLLM makes room for, .*; got 16.0"),
        ({"pad_to": np.float32(16)}, "pad_to must be a rank that vLLM makes room for"),
        ({"pad_to": "16"}, "pad_to must be a rank that vLLM makes room for, .*; got '16'"),
        ({"pad_to": np.array([8, 16])}, "pad_to must be a rank that vLLM makes room for"),
        ({"pad_to": 8, "ranks": "exact"}, "pad_to gives all modules one rank, ranks=exact each its own"),
        ({"ranks": "equal"}, "ranks must be uniform or exact; got 'equal'"),
        (
            {"pad_to": 8},
            r"pad_to must be at least 9, the largest rank of a module; got 8: pad to 16, or ask for rank 8",
        ),
    ):
        with pytest.raises(AdapterError, match=match):
            merge(mixed, out=out, **options)
        assert not out.exists()
    with pytest.raises(AdapterError, match=r"pad_to must be at least 600, .* got 512: ask for rank 512 too"):
        RankLayout(pad_to=512).stored({"a": 600})


@pytest.mark.parametrize("whole", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_a_whole_number_is_one_whatever_its_type(whole: Callable[[int], int], plain: Path, tmp_path: Path) -> None:
    adapter = {"a": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 0.3)}
    write_adapter(tmp_path / "written", adapter, "base", pad_to=whole(8))
    np.testing.assert_allclose(with_one_rank(tmp_path / "written")["a"], np.full((2, 3), 0.3), rtol=1e-6)
    for number, options in enumerate(
        ({"pad_to": whole(8)}, {"rank": whole(2)}, {"rank": whole(1), "pad_to": whole(8)})
    ):
        result = merge([plain], out=tmp_path / f"{number}", **options)
        config = json.loads((tmp_path / f"{number}" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == (8 if "pad_to" in options else 2)
        assert all(type(module.rank) is int and type(module.stored_rank) is int for module in result.modules)


@pytest.mark.parametrize("scaling", [0.0, -0.0, 1e20, -2.0, 1e-12, 2.0**33, 0.5])
def test_any_scaling_becomes_a_whole_alpha_that_an_unsigned_integer_holds(scaling: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    write_adapter(tmp_path / "out", {"a": LoraFactors(A, B, scaling)}, "base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert type(config["lora_alpha"]) is int and config["lora_alpha"] in UINT32 and config["lora_alpha"] > 0
    expected = scaling * (B.double() @ A.double()).numpy()
    np.testing.assert_allclose(with_one_rank(tmp_path / "out")["a"], expected, rtol=1e-5, atol=1e-6 * abs(scaling))
    # What is zero can still be trained from.
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.a.lora_A.weight"].any()


def test_fresh_rows_are_as_large_as_those_of_peft_and_differ_between_modules() -> None:
    layer = torch.nn.Linear(400, 64, bias=False)
    torch.nn.init.kaiming_uniform_(layer.weight, a=5**0.5)  # PEFT's reset_lora_parameters
    weight = layer.weight.detach()
    rows = fresh_rows("model.layers.0.q_proj", 64, 400)
    assert float(rows.std()) == pytest.approx(float(weight.std()), rel=0.02)
    assert rows.abs().max() <= 0.05 and abs(float(rows.mean())) < 1e-3
    assert torch.equal(rows, fresh_rows("model.layers.0.q_proj", 64, 400))
    assert not torch.equal(rows, fresh_rows("model.layers.1.q_proj", 64, 400))
