"""Merging against two authorities: stock PEFT for what an adapter means, dense float64 numpy sums for what is right."""

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PeftModel,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
)

from flexlora.adapters import merge_request
from flexlora.adapters.folder import read_adapter
from flexlora.adapters.merge import merge
from flexlora.adapters.together import MergeError
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import AdapterState, LoraFactors

ATTENTION = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]


@pytest.mark.parametrize(("method", "weights"), [("mean", (1.0, 2.0, 5.0)), ("sum", (1.0, -2.0, 0.25))])
def test_with_every_direction_kept_the_result_is_the_dense_sum(
    network: PreTrainedModel,
    mixed: list[Path],
    tmp_path: Path,
    method: str,
    weights: Sequence[float],
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
) -> None:
    result = merge(mixed, weights, method=method, exact=True, out=tmp_path / "out")
    divisor = sum(weights) if method == "mean" else 1.0
    changes = [deltas(network, folder) for folder in mixed]
    expected = dense_sum(changes, [weight / divisor for weight in weights])
    assert_same_changes(deltas(network, tmp_path / "out"), expected)
    assert result.energy_kept == pytest.approx(1, abs=1e-12)
    ranks = {module.path: module.rank for module in result.modules}
    assert ranks == {path: np.linalg.matrix_rank(matrix) for path, matrix in expected.items()}


def test_the_merged_adapter_computes_what_the_dense_sum_does(
    network: PreTrainedModel,
    mixed: list[Path],
    tmp_path: Path,
    logits: Helper,
    loaded: Helper,
    deltas: Helper,
    dense_sum: Helper,
) -> None:
    merge(mixed, (3, 1, 1), exact=True, out=tmp_path / "out")
    summed = dense_sum([deltas(network, folder) for folder in mixed], (0.6, 0.2, 0.2))
    dense = copy.deepcopy(network)
    with torch.no_grad():
        for path, matrix in summed.items():
            dense.get_submodule(path).weight += torch.from_numpy(matrix).float()
    merged = logits(loaded(network, tmp_path / "out"))
    torch.testing.assert_close(merged, logits(dense), rtol=1e-4, atol=1e-5)
    assert (merged - logits(network)).abs().max() > 0.01


def test_a_smaller_rank_is_the_best_approximation(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path, deltas: Helper, dense_sum: Helper, config_of: Helper
) -> None:
    result = merge(mixed, rank=2, out=tmp_path / "out")
    total = dense_sum([deltas(network, folder) for folder in mixed], [1 / 3] * 3)
    written = deltas(network, tmp_path / "out")
    kept = {module.path: module.energy_kept for module in result.modules}
    for path, matrix in total.items():
        U, S, Vh = np.linalg.svd(matrix)
        np.testing.assert_allclose(written[path], (U[:, :2] * S[:2]) @ Vh[:2], atol=1e-6 * S[0])
        assert kept[path] == pytest.approx((S[:2] ** 2).sum() / (S**2).sum(), rel=1e-9)
    assert config_of(tmp_path / "out")["r"] == 2
    assert config_of(tmp_path / "out")["rank_pattern"] == config_of(tmp_path / "out")["alpha_pattern"] == {}


@pytest.mark.parametrize("first_directions", [1, 2, 64])
def test_energy_takes_the_fewest_directions_that_hold_it(
    network: PreTrainedModel,
    mixed: list[Path],
    tmp_path: Path,
    first_directions: int,
    monkeypatch: pytest.MonkeyPatch,
    deltas: Helper,
    dense_sum: Helper,
) -> None:
    monkeypatch.setattr(merge_request, "FIRST_DIRECTIONS", first_directions)
    result = merge(mixed, energy=0.9, out=tmp_path / "out")
    total = dense_sum([deltas(network, folder) for folder in mixed], [1 / 3] * 3)
    for module in result.modules:
        S = np.linalg.svd(total[module.path], compute_uv=False)
        shares = np.cumsum(S**2) / (S**2).sum()
        assert module.rank == 1 + int((shares < 0.9).sum())
        assert module.energy_kept == pytest.approx(shares[module.rank - 1], rel=1e-9)
    everything = merge(mixed, energy=1.0, out=tmp_path / "everything")
    assert everything.energy_kept == pytest.approx(1, abs=1e-12)


def test_without_a_choice_a_module_gets_the_largest_rank_an_adapter_has_there(
    mixed: list[Path], tmp_path: Path
) -> None:
    result = merge(mixed, out=tmp_path / "out")
    assert {module.rank for module in result.modules if "k_proj" in module.path} == {3}
    assert {module.rank for module in result.modules if module.path.endswith("1.self_attn.q_proj")} == {9}
    assert all(module.rank == max(module.ranks) for module in result.modules)


def test_one_adapter_at_its_own_rank_stays_the_same_function(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path, logits: Helper, loaded: Helper, lora_layers: Helper
) -> None:
    for number, folder in enumerate(mixed):
        merge([folder], ranks="exact", out=tmp_path / f"out-{number}")
        merged = loaded(network, tmp_path / f"out-{number}")
        torch.testing.assert_close(logits(merged), logits(loaded(network, folder)), rtol=1e-4, atol=1e-5)
        before, after = lora_layers(loaded(network, folder)), lora_layers(merged)
        assert {path: layer.r for path, layer in after.items()} == {path: layer.r for path, layer in before.items()}


def test_every_scaling_in_the_result_is_one_and_factors_are_of_one_size(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path, loaded: Helper, lora_layers: Helper
) -> None:
    result = merge(mixed, out=tmp_path / "out")
    kept = {module.path: module.rank for module in result.modules}
    for path, layer in lora_layers(loaded(network, tmp_path / "out")).items():
        A, B = layer.lora_A["default"].weight[: kept[path]], layer.lora_B["default"].weight
        assert layer.scaling["default"] == 1.0
        assert A.norm() == pytest.approx(float(B.norm()), rel=1e-5)


def test_peft_cat_agrees(network: PreTrainedModel, save: Save, tmp_path: Path, logits: Helper, loaded: Helper) -> None:
    folders = [
        save(network, r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=EVERYTHING)
        for rank, alpha, rslora in ((2, 16, False), (5, 3, True), (8, 8, False))
    ]
    weights = [0.5, -0.2, 1.5]
    stock = PeftModel.from_pretrained(copy.deepcopy(network), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        stock.load_adapter(folder, adapter_name=str(number))
    stock.base_model.add_weighted_adapter(["0", "1", "2"], weights, "all", combination_type="cat")
    stock.set_adapter("all")
    merge(folders, weights, method="sum", exact=True, out=tmp_path / "out")
    torch.testing.assert_close(logits(loaded(network, tmp_path / "out")), logits(stock.eval()), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_adapters_add_up_to_their_dense_sum(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("property")
    out_features, in_features = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    ranks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    weights = [data.draw(st.sampled_from([-2.0, -0.5, 1e-3, 1.0, 40.0])) for _ in ranks]
    expected = np.zeros((out_features, in_features))
    for number, (rank, weight) in enumerate(zip(ranks, weights, strict=True)):
        scale = data.draw(st.sampled_from([1e-4, 1.0, 1e3]))
        A = torch.randn(rank, in_features, generator=generator)
        B = scale * torch.randn(out_features, rank, generator=generator)
        write_adapter(folder / str(number), {"layer": LoraFactors(A, B, 1.5)}, "base")
        expected += weight * 1.5 * (B.double() @ A.double()).numpy()
    names = [folder / str(number) for number in range(len(ranks))]
    merge(names, weights, method="sum", exact=True, out=folder / "out")
    actual = read_adapter(folder / "out")["layer"].delta().numpy()
    assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)


def test_an_adapter_given_twice_counts_twice_and_is_named(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(plain)
    result = merge([plain, tmp_path / "link"], out=tmp_path / "out")
    assert f"{plain} was given 2 times; each of them counts" in result.notes


def test_an_adapter_that_changes_nothing_counts_and_is_named(
    network: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
    rewrite: Helper,
) -> None:
    folders = [save(network, r=rank, target_modules=ATTENTION) for rank in (2, 3, 4)]
    for folder, letter, is_some in ((folders[1], "lora_B", False), (folders[2], "lora_A", True)):
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in tensors:
            if letter in key and (not is_some or "layers.1" in key):
                tensors[key].zero_()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    result = merge(folders, exact=True, out=tmp_path / "out")
    notes = [note for note in result.notes if "changes nothing" in note]
    assert notes == [
        f"{folders[1]} changes nothing anywhere (a factor is zero), and its weight counts all the same",
        f"{folders[2]} changes nothing in 2 of its 4 modules (a factor is zero), and its weight counts all the same",
    ]
    expected = dense_sum([deltas(network, folder) for folder in folders], [1 / 3] * 3)
    assert_same_changes(deltas(network, tmp_path / "out"), expected)
    rewrite(folders[0], lora_alpha=0)
    result = merge(folders[:1], out=tmp_path / "alone")
    assert any(f"{folders[0]} changes nothing anywhere" in note for note in result.notes)


def test_changes_that_cancel_leave_a_module_without_effect(
    network: PreTrainedModel, save: Save, tmp_path: Path, logits: Helper, loaded: Helper
) -> None:
    folder = save(network, r=4, target_modules=ATTENTION)
    result = merge([folder, folder], (1, -1), method="sum", out=tmp_path / "out")
    assert {(module.rank, module.energy_kept) for module in result.modules} == {(1, 1.0)}
    torch.testing.assert_close(logits(loaded(network, tmp_path / "out")), logits(network))


def test_ranks_of_layer_1_and_layer_11_stay_apart(
    deep: PreTrainedModel, save: Save, tmp_path: Path, loaded: Helper, lora_layers: Helper
) -> None:
    folders = [
        save(deep, r=2, target_modules=ATTENTION, rank_pattern={"layers.1.self_attn.q_proj": 5}),
        save(deep, r=2, target_modules=["q_proj"], rank_pattern={r"layers\.11\.self_attn\.q_proj": 3}),
    ]
    result = merge(folders, exact=True, ranks="exact", out=tmp_path / "out")
    layers = lora_layers(loaded(deep, tmp_path / "out"))
    assert {path: layer.r["default"] for path, layer in layers.items()} == {
        module.path: module.rank for module in result.modules
    }
    ranks = {path.split("layers.")[1]: layer.r["default"] for path, layer in layers.items()}
    assert (ranks["1.self_attn.q_proj"], ranks["11.self_attn.q_proj"], ranks["10.self_attn.q_proj"]) == (7, 5, 4)
    assert len({layer.scaling["default"] * layer.r["default"] for layer in layers.values()}) == 1


def test_modules_of_one_name_in_different_places_stay_apart(tmp_path: Path) -> None:
    shapes = {"proj": (6, 4), "deep.proj": (6, 4), "a.deep.proj": (6, 4), "aXdeep.proj": (6, 4)}
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        adapter = {
            path: LoraFactors(
                torch.randn(1 + place, 4, generator=generator), torch.randn(6, 1 + place, generator=generator), 2.0
            )
            for place, path in enumerate(shapes)
            if number or place
        }
        write_adapter(tmp_path / str(number), adapter, "base")
    result = merge([tmp_path / "0", tmp_path / "1"], rank=3, ranks="exact", out=tmp_path / "out")
    network = torch.nn.ModuleDict(
        {
            "proj": torch.nn.Linear(4, 6),
            "deep": torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 6)}),
            "a": torch.nn.ModuleDict({"deep": torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 6)})}),
            "aXdeep": torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 6)}),
        }
    )
    injected = inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path / "out"), network)
    ranks = {path: injected.get_submodule(path).r["default"] for path in shapes}
    assert ranks == {module.path: module.rank for module in result.modules}
    assert ranks == {"proj": 1, "deep.proj": 3, "a.deep.proj": 3, "aXdeep.proj": 3}


def test_conv1d_of_gpt2_is_merged_in_its_own_orientation(
    gpt2: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    logits: Helper,
    loaded: Helper,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
    config_of: Helper,
) -> None:
    config = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    folders = [save(gpt2, r=rank, lora_alpha=7, **config) for rank in (2, 3)]
    result = merge(folders, (1, 3), exact=True, out=tmp_path / "out")
    assert {module.shape for module in result.modules} == {(72, 24), (96, 24)}
    expected = dense_sum([deltas(gpt2, folder) for folder in folders], (0.25, 0.75))
    assert_same_changes(deltas(gpt2, tmp_path / "out"), expected)
    dense = copy.deepcopy(gpt2)
    with torch.no_grad():
        for path, matrix in expected.items():
            dense.get_submodule(path).weight += torch.from_numpy(matrix.T).float()
    torch.testing.assert_close(logits(loaded(gpt2, tmp_path / "out")), logits(dense), rtol=1e-4, atol=1e-5)
    assert config_of(tmp_path / "out")["fan_in_fan_out"] is True
    assert config_of(tmp_path / "out")["task_type"] == "CAUSAL_LM"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("with_copies", [False, True])
def test_embeddings_are_merged_and_copies_of_the_base_are_taken_over(
    network: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    with_copies: bool,
    logits: Helper,
    loaded: Helper,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
) -> None:
    config = {"target_modules": ["embed_tokens", "q_proj"], "embeddings": with_copies, "lora_alpha": 6}
    folders = [save(network, r=rank, std=0.2, **config) for rank in (2, 4)]
    result = merge(folders, exact=True, out=tmp_path / "out")
    module = next(module for module in result.modules if module.path == "model.embed_tokens")
    assert (module.shape, module.rank) == ((32, 259), 6)
    expected = dense_sum([deltas(network, folder) for folder in folders], (0.5, 0.5))
    assert_same_changes(deltas(network, tmp_path / "out"), expected)
    dense = copy.deepcopy(network)
    dense.lm_head.weight = torch.nn.Parameter(dense.lm_head.weight.detach().clone())  # untied, as under LoRA
    with torch.no_grad():
        for path, matrix in expected.items():
            weight = dense.get_submodule(path).weight
            weight += torch.from_numpy(matrix.T if "embed" in path else matrix).float()
    torch.testing.assert_close(logits(loaded(network, tmp_path / "out")), logits(dense), rtol=1e-4, atol=1e-4)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (key in written) == with_copies
    assert any("were taken over as they are" in note for note in result.notes) == with_copies
    if with_copies:
        tensors = load_file(folders[1] / "adapter_model.safetensors")
        tensors[key][0, 0] += 1
        save_file(tensors, folders[1] / "adapter_model.safetensors")
        with pytest.raises(MergeError, match=r"adapter-0 and .*adapter-1 hold different weights"):
            merge(folders, out=tmp_path / "different")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_adapters_of_tied_embeddings_stay_the_same_function(
    network: PreTrainedModel, save: Save, tmp_path: Path, logits: Helper, loaded: Helper
) -> None:
    folder = save(network, r=3, std=0.2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    result = merge([folder], out=tmp_path / "out")
    assert {module.path for module in result.modules} == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(
        logits(loaded(network, tmp_path / "out")), logits(loaded(network, folder)), rtol=1e-4, atol=1e-4
    )


def test_more_directions_than_there_are_and_a_looser_accuracy_may_be_asked_for(
    network: PreTrainedModel,
    mixed: list[Path],
    tmp_path: Path,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
) -> None:
    merge(mixed, rank=500, accuracy="fast", out=tmp_path / "out")
    expected = dense_sum([deltas(network, folder) for folder in mixed], [1 / 3] * 3)
    assert_same_changes(deltas(network, tmp_path / "out"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_result(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path, deltas: Helper, assert_same_changes: Check
) -> None:
    for device in ("cpu", "cuda"):
        merge(mixed, rank=4, device=device, out=tmp_path / device)
    assert_same_changes(deltas(network, tmp_path / "cuda"), deltas(network, tmp_path / "cpu"), rtol=1e-5)


def test_finite_values_that_are_out_of_all_scale_are_merged_or_named(tmp_path: Path, assert_refused: Check) -> None:
    huge = LoraFactors(torch.full((1, 3), 3e38), torch.full((2, 1), 3e38), 1.0)
    write_adapter(tmp_path / "huge", {"layer": huge}, "base")
    merge([tmp_path / "huge"], out=tmp_path / "same")
    merged = read_adapter(tmp_path / "same")["layer"]
    np.testing.assert_allclose(merged.delta().numpy(), huge.delta().numpy(), rtol=1e-6)
    assert_refused([tmp_path / "huge"], "layer", method="sum", weights=[100.0])


def test_an_interruption_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert list(tmp_path.iterdir()) == [plain]
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([plain], out=tmp_path / "parent" / "out", notify=interrupt)
    assert list(tmp_path.iterdir()) == [plain]


def test_equal_merges_give_equal_bytes_and_the_order_of_adapters_hardly_matters(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path, deltas: Helper, assert_same_changes: Check
) -> None:
    for name, folders in (("one", mixed), ("two", mixed), ("turned", mixed[::-1])):
        merge(folders, exact=True, out=tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert_same_changes(deltas(network, tmp_path / "turned"), deltas(network, tmp_path / "one"))


def test_a_read_back_result_can_be_merged_again(mixed: list[Path], tmp_path: Path) -> None:
    merge(mixed, exact=True, out=tmp_path / "one")
    merge([tmp_path / "one"], exact=True, out=tmp_path / "two")
    first: AdapterState = read_adapter(tmp_path / "one")
    second = read_adapter(tmp_path / "two")
    assert first.keys() == second.keys()
    for path, factors in first.items():
        torch.testing.assert_close(second[path].delta(), factors.delta(), rtol=1e-5, atol=1e-7)
    shutil.rmtree(tmp_path / "one")
