"""Merging against two authorities: stock PEFT for what an adapter means, dense float64 numpy sums for what is right."""

import copy
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModel,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from flexlora import cli
from flexlora.adapters import merge_request
from flexlora.adapters.coefficients import COEFFICIENTS
from flexlora.adapters.folder import open_adapter, read_adapter
from flexlora.adapters.merge import merge
from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.peft_settings import REFUSED, UNDERSTOOD
from flexlora.adapters.tensor_file import TensorSpool
from flexlora.adapters.together import MergeError
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import AdapterState, LoraFactors

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


# What comes out


@pytest.mark.parametrize(("method", "weights"), [("mean", (1.0, 2.0, 5.0)), ("sum", (1.0, -2.0, 0.25))])
def test_with_every_direction_kept_the_result_is_the_dense_sum(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path, method: str, weights: Sequence[float]
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
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path
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


def test_a_smaller_rank_is_the_best_approximation(network: PreTrainedModel, mixed: list[Path], tmp_path: Path) -> None:
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
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path, first_directions: int, monkeypatch: pytest.MonkeyPatch
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
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path
) -> None:
    for number, folder in enumerate(mixed):
        merge([folder], out=tmp_path / f"out-{number}")
        merged = loaded(network, tmp_path / f"out-{number}")
        torch.testing.assert_close(logits(merged), logits(loaded(network, folder)), rtol=1e-4, atol=1e-5)
        before, after = lora_layers(loaded(network, folder)), lora_layers(merged)
        assert {path: layer.r for path, layer in after.items()} == {path: layer.r for path, layer in before.items()}


def test_every_scaling_in_the_result_is_one_and_factors_are_of_one_size(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path
) -> None:
    merge(mixed, out=tmp_path / "out")
    for layer in lora_layers(loaded(network, tmp_path / "out")).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert layer.scaling["default"] == 1.0
        assert A.norm() == pytest.approx(float(B.norm()), rel=1e-5)


def test_peft_cat_agrees(network: PreTrainedModel, save: Save, tmp_path: Path) -> None:
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


# Modules that adapters lack


def test_a_missing_module_counts_as_unchanged_or_is_left_out_of_the_mean(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path
) -> None:
    weights = (1.0, 2.0, 5.0)
    zero = merge(mixed, weights, exact=True, out=tmp_path / "zero")
    merge(mixed, weights, exact=True, missing="renormalise", out=tmp_path / "renormalise")
    changes = [deltas(network, folder) for folder in mixed]
    unchanged = dense_sum(changes, [weight / 8 for weight in weights])
    assert_same_changes(deltas(network, tmp_path / "zero"), unchanged)
    having = {
        path: sum(weight for change, weight in zip(changes, weights, strict=True) if path in change)
        for path in unchanged
    }
    assert set(having.values()) == {2.0, 3.0, 7.0, 8.0}
    averaged = {path: matrix * 8 / having[path] for path, matrix in unchanged.items()}
    assert_same_changes(deltas(network, tmp_path / "renormalise"), averaged)
    assert any("modules are missing in some adapters, which count as unchanged" in note for note in zero.notes)


@pytest.mark.parametrize("weights", [(1e308, 1e308), (5e-324, 5e-324)])
def test_weights_whose_sum_leaves_the_range_of_numbers_are_still_shares(
    plain: Path, tmp_path: Path, network: PreTrainedModel, weights: Sequence[float]
) -> None:
    for missing in ("zero", "renormalise"):
        merge([plain, plain], weights, missing=missing, out=tmp_path / missing)
        assert_same_changes(deltas(network, tmp_path / missing), deltas(network, plain))


def test_an_adapter_given_twice_counts_twice_and_is_named(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(plain)
    result = merge([plain, tmp_path / "link"], out=tmp_path / "out")
    assert f"{plain} was given 2 times, and every time counts" in result.notes


def test_changes_that_cancel_leave_a_module_without_effect(
    network: PreTrainedModel, save: Save, tmp_path: Path
) -> None:
    folder = save(network, r=4, target_modules=ATTENTION)
    result = merge([folder, folder], (1, -1), method="sum", out=tmp_path / "out")
    assert {(module.rank, module.energy_kept) for module in result.modules} == {(1, 1.0)}
    torch.testing.assert_close(logits(loaded(network, tmp_path / "out")), logits(network))


# What PEFT makes of the folder


def test_ranks_of_layer_1_and_layer_11_stay_apart(deep: PreTrainedModel, save: Save, tmp_path: Path) -> None:
    folders = [
        save(deep, r=2, target_modules=ATTENTION, rank_pattern={"layers.1.self_attn.q_proj": 5}),
        save(deep, r=2, target_modules=["q_proj"], rank_pattern={r"layers\.11\.self_attn\.q_proj": 3}),
    ]
    result = merge(folders, exact=True, out=tmp_path / "out")
    layers = lora_layers(loaded(deep, tmp_path / "out"))
    assert {path: layer.r["default"] for path, layer in layers.items()} == {
        module.path: module.rank for module in result.modules
    }
    ranks = {path.split("layers.")[1]: layer.r["default"] for path, layer in layers.items()}
    assert (ranks["1.self_attn.q_proj"], ranks["11.self_attn.q_proj"], ranks["10.self_attn.q_proj"]) == (7, 5, 4)
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}


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
    result = merge([tmp_path / "0", tmp_path / "1"], rank=3, out=tmp_path / "out")
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


def test_names_that_chose_the_modules_are_kept_where_they_tell_exactly_which(
    network: PreTrainedModel, mixed: list[Path], save: Save, tmp_path: Path
) -> None:
    other = save(network, r=2, target_modules=["k_proj", "q_proj"])
    merge([mixed[0], other], rank=2, out=tmp_path / "short")
    assert config_of(tmp_path / "short")["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    one_layer = save(network, r=2, target_modules=["o_proj"], layers_to_transform=[1])
    first_layer = save(network, r=2, target_modules=["o_proj"], layers_to_transform=0)
    for number, folders in enumerate(([*mixed], [mixed[0], one_layer], [first_layer])):
        result = merge(folders, out=tmp_path / f"long-{number}")
        targets = config_of(tmp_path / f"long-{number}")["target_modules"]
        assert targets == sorted(module.path for module in result.modules)
        assert lora_layers(loaded(network, tmp_path / f"long-{number}")).keys() == set(targets)


def test_conv1d_of_gpt2_is_merged_in_its_own_orientation(gpt2: PreTrainedModel, save: Save, tmp_path: Path) -> None:
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
    network: PreTrainedModel, save: Save, tmp_path: Path, with_copies: bool
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
        with pytest.raises(MergeError, match=r"adapter-0 and .*adapter-1 hold different ones"):
            merge(folders, out=tmp_path / "different")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_adapters_of_tied_embeddings_stay_the_same_function(
    network: PreTrainedModel, save: Save, tmp_path: Path
) -> None:
    folder = save(network, r=3, std=0.2, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    result = merge([folder], out=tmp_path / "out")
    assert {module.path for module in result.modules} == {"model.embed_tokens", "lm_head"}
    torch.testing.assert_close(
        logits(loaded(network, tmp_path / "out")), logits(loaded(network, folder)), rtol=1e-4, atol=1e-4
    )


def test_repeated_layers_are_repeated_in_the_result(network: PreTrainedModel, save: Save, tmp_path: Path) -> None:
    config = {"target_modules": ATTENTION, "layer_replication": [[0, 2], [0, 2]]}
    folders = [save(network, r=rank, **config) for rank in (2, 3)]
    merge(folders, exact=True, out=tmp_path / "out")
    expected = dense_sum([deltas(network, folder) for folder in folders], (0.5, 0.5))
    assert "model.layers.3.self_attn.q_proj" in expected
    assert_same_changes(deltas(network, tmp_path / "out"), expected)
    plain = save(network, r=2, target_modules=ATTENTION)
    with pytest.raises(MergeError, match="layer_replication must be the same in all adapters"):
        merge([*folders, plain], out=tmp_path / "mixed")


def test_an_adapter_that_names_its_class_of_model_still_loads_without_a_base(
    network: PreTrainedModel, save: Save, tmp_path: Path
) -> None:
    network.save_pretrained(tmp_path / "base")
    folders = [save(network, r=rank, target_modules=ATTENTION) for rank in (2, 3)]
    for folder in folders:
        rewrite(folder, base_model_name_or_path=str(tmp_path / "base"))
    merge(folders, exact=True, out=tmp_path / "out")
    alone = AutoPeftModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(alone), logits(loaded(network, tmp_path / "out")))
    rewrite(folders[1], auto_mapping=None)
    merge(folders, out=tmp_path / "unclear")
    assert config_of(tmp_path / "unclear")["auto_mapping"] is None


# PEFT itself adds the pattern for the fused experts that it does not find then.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("choice", [{}, {"exact": True}, {"energy": 0.9}, {"rank": 3}], ids=str)
def test_experts_get_one_rank_so_that_stock_peft_can_fuse_them(tmp_path: Path, choice: dict[str, object]) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MixtralForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    for number, (rank, names) in enumerate(((4, ("w1", "w3", "q_proj", "k_proj")), (2, ("w2", "v_proj", "o_proj")))):
        adapter = {}
        for layer in range(2):
            block = f"model.layers.{layer}"
            for name in names:
                shape = {"w1": (20, 16), "w2": (16, 20), "w3": (20, 16)}.get(name, (16, 16))
                experts = [f"{block}.block_sparse_moe.experts.{expert}.{name}" for expert in range(2)]
                for path in experts if name.startswith("w") else [f"{block}.self_attn.{name}"]:
                    A = 0.2 * torch.randn(rank, shape[1], generator=generator)
                    B = torch.randn(shape[0], rank, generator=generator)
                    # One expert of one layer has learned nothing.
                    adapter[path] = LoraFactors(A, 0 * B if "layers.1" in path and "experts.1" in path else B, 0.5)
        write_adapter(tmp_path / f"{number}", adapter, "mixtral")
    result = merge([tmp_path / "0", tmp_path / "1"], method="sum", out=tmp_path / "out", **choice)
    ranks = {module.path: module.rank for module in result.modules}
    assert len({rank for path, rank in ranks.items() if "experts" in path}) == 1
    assert any("of experts got zeros up to rank" in note for note in result.notes)
    assert {path: factors.rank for path, factors in read_adapter(tmp_path / "out").items()} == ranks
    given = read_adapter(tmp_path / "0") | read_adapter(tmp_path / "1")
    dense = copy.deepcopy(network)
    for path, factors in given.items():
        U, S, Vh = np.linalg.svd(factors.delta().numpy())
        shares = np.cumsum(S**2) / max((S**2).sum(), 1e-300)
        kept = choice.get("rank", 1 + int((shares < 0.9).sum()) if S[0] > 0 and "energy" in choice else len(S))
        change = torch.from_numpy((U[:, :kept] * S[:kept]) @ Vh[:kept]).float()
        layer = dense.model.layers[int(path.split(".")[2])]
        with torch.no_grad():
            if "experts" not in path:
                layer.get_submodule(path.split(".", 3)[3]).weight += change
                continue
            expert, name = int(path.split(".")[5]), path.rpartition(".")[2]
            if name == "w2":
                layer.mlp.experts.down_proj[expert] += change
            else:
                half = slice(0, 20) if name == "w1" else slice(20, 40)
                layer.mlp.experts.gate_up_proj[expert, half] += change
    stock = logits(loaded(network, tmp_path / "out"))
    torch.testing.assert_close(stock, logits(dense), rtol=1e-4, atol=1e-4)
    assert (stock - logits(network)).abs().max() > 0.01


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica"])
def test_ways_to_start_that_leave_the_base_alone_are_taken(
    network: PreTrainedModel, save: Save, tmp_path: Path, init: str
) -> None:
    folder = save(network, r=4, target_modules=ATTENTION)
    rewrite(folder, init_lora_weights=init)
    merge([folder], out=tmp_path / "out")
    rewrite(folder, init_lora_weights=True)
    assert_same_changes(deltas(network, tmp_path / "out"), deltas(network, folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_read_as_it_is_and_written_where_asked(
    network: PreTrainedModel, save: Save, tmp_path: Path, dtype: str
) -> None:
    folders = [save(network, r=rank, dtype=getattr(torch, dtype), target_modules=ATTENTION, std=0.3) for rank in (2, 5)]
    expected = dense_sum([deltas(network, folder) for folder in folders], (0.5, 0.5))
    merge(folders, exact=True, out=tmp_path / "float32")
    assert_same_changes(deltas(network, tmp_path / "float32"), expected)
    merge(folders, exact=True, dtype=dtype, out=tmp_path / dtype)
    written = load_file(tmp_path / dtype / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert_same_changes(deltas(network, tmp_path / dtype), expected, rtol=0.01 if dtype == "bfloat16" else 2e-3)


def test_values_beyond_the_type_asked_for_are_refused(tmp_path: Path) -> None:
    write_adapter(
        tmp_path / "large", {"layer": LoraFactors(torch.full((1, 3), 1e6), torch.full((2, 1), 1e6), 1.0)}, "b"
    )
    with pytest.raises(MergeError, match=r"for float16; the largest number of layer is .*: use float32 or bf"):
        merge([tmp_path / "large"], dtype="float16", out=tmp_path / "out")
    merge([tmp_path / "large"], dtype="bfloat16", out=tmp_path / "out")
    # Too small is as bad: factors that vanish, or nearly, are another function.
    write_adapter(tmp_path / "small", {"layer": LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1e-9)}, "b")
    assert_refused([tmp_path / "small"], "must be within 6e-05 and 7e.04 for float16.*use float32", dtype="float16")
    for weight in (1e-200, 1e200):
        for choice in ({}, {"energy": 0.9}):
            assert_refused([tmp_path / "small"], "nearer to 1", method="sum", weights=[weight], **choice)


def test_more_directions_than_there_are_and_a_looser_accuracy_may_be_asked_for(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path
) -> None:
    merge(mixed, rank=500, accuracy="fast", out=tmp_path / "out")
    expected = dense_sum([deltas(network, folder) for folder in mixed], [1 / 3] * 3)
    assert_same_changes(deltas(network, tmp_path / "out"), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same_result(network: PreTrainedModel, mixed: list[Path], tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        merge(mixed, rank=4, device=device, out=tmp_path / device)
    assert_same_changes(deltas(network, tmp_path / "cuda"), deltas(network, tmp_path / "cpu"), rtol=1e-5)


# What is refused


@pytest.fixture
def plain(network: PreTrainedModel, save: Save) -> Path:
    return save(network, r=2, target_modules=ATTENTION)


def rename_keys(folder: Path, old: str, new: str) -> Path:
    path = folder / "adapter_model.safetensors"
    renamed = {key.replace(old, new): tensor for key, tensor in load_file(path).items()}
    assert renamed.keys() != load_file(path).keys()
    save_file(renamed, path, metadata={"format": "pt"})
    return folder


def assert_refused(folders: Sequence[Path], match: str, **options: object) -> None:
    """One clear line per bad adapter, and nothing written."""
    parent = folders[0].parent
    before = sorted(parent.rglob("*"))
    with pytest.raises(AdapterError, match=match) as caught:
        merge(folders, out=parent / "refused", **options)
    assert "\n" not in str(caught.value)
    assert sorted(parent.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "sets use_dora: DoRA rescales the columns"),
        ({"bias": "lora_only"}, "bias must be none; with lora_only biases were trained"),
        ({"bias": "all"}, "bias must be none; with all biases were trained"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save: whole weights were trained"),
        ({"trainable_token_indices": [3, 4]}, "sets trainable_token_indices: single token embeddings"),
        ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, "sets alora_invocation_tokens: aLoRA is active"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must leave the base as it is; pissa changes it"),
        (
            {"init_lora_weights": "pissa_niter_2"},
            "pissa_niter_2 changes it at the start: save the adapter with path_in",
        ),
        ({"init_lora_weights": "olora"}, "olora changes it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_stock_peft_saves_beyond_plain_lora_is_refused_by_name(
    network: PreTrainedModel, save: Save, plain: Path, config: dict[str, object], match: str
) -> None:
    folder = save(network, r=2, target_modules=ATTENTION, **config)
    assert_refused([plain, folder], f"{folder.name}.*{match}")


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_a_bias_behind_lora_b_is_refused(gpt2: PreTrainedModel, save: Save) -> None:
    folder = save(gpt2, r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)
    assert_refused([folder], "sets lora_bias: a bias behind lora_B")


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "somebodys_own"])
def test_starts_that_change_the_base_are_refused(plain: Path, init: str) -> None:
    assert_refused([rewrite(plain, init_lora_weights=init)], f"{init} changes it at the start")


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_every_setting_that_changes_what_factors_mean_is_refused(plain: Path, key: str) -> None:
    assert_refused([rewrite(plain, **{key: {"some": "thing"}})], f"sets {key}: ")


def test_every_setting_of_stock_peft_is_either_understood_or_refused() -> None:
    known = UNDERSTOOD | REFUSED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known
    assert not UNDERSTOOD & REFUSED.keys()


def test_a_setting_that_is_not_known_is_refused_unless_it_is_off(plain: Path, tmp_path: Path) -> None:
    assert_refused([rewrite(plain, use_superlora=True)], "sets use_superlora, which is not known here")
    merge([rewrite(plain, use_superlora=False)], out=tmp_path / "off")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
        (LoHaConfig(target_modules=["k_proj"]), "LOHA"),
        (TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]), "TRAINABLE_TOKENS"),
    ],
    ids=["ia3", "loha", "tokens"],
)
def test_other_kinds_of_adapters_are_refused(
    network: PreTrainedModel, plain: Path, tmp_path: Path, config: object, name: str
) -> None:
    get_peft_model(copy.deepcopy(network), config).save_pretrained(tmp_path / "other", save_embedding_layers=False)
    assert_refused([plain, tmp_path / "other"], f"peft_type must be LORA; got {name}")


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
def test_layers_that_are_not_linear_are_refused(tmp_path: Path, config: dict[str, object], match: str) -> None:
    assert_refused([saved_from(Bag(), tmp_path / "bag", **config)], match)


def test_different_bases_are_refused_by_name_unless_allowed(mixed: list[Path], tmp_path: Path) -> None:
    rewrite(mixed[0], base_model_name_or_path="us/llama/")
    rewrite(mixed[1], base_model_name_or_path="us/llama")
    rewrite(mixed[2], base_model_name_or_path="them/llama")
    assert_refused(
        mixed,
        r"must share one base model; got us/llama \(.*adapter-0\) and them/llama \(.*adapter-2\).*--allow-different",
    )
    result = merge(mixed, allow_different_bases=True, out=tmp_path / "out")
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == result.base_model == "us/llama"
    assert any("the result names the first" in note for note in result.notes)
    rewrite(mixed[2], base_model_name_or_path=None)
    result = merge(mixed, out=tmp_path / "nameless")
    assert any("adapter-2 does not say which base model" in note for note in result.notes)
    rewrite(mixed[2], base_model_name_or_path="us/llama", revision="main")
    assert not any("base model" in note for note in merge(mixed, out=tmp_path / "main").notes)
    rewrite(mixed[2], revision="v2")
    assert_refused(mixed, r"got us/llama \(.*adapter-0\) and us/llama@v2 \(.*adapter-2\)")


def test_one_path_with_two_shapes_is_refused(plain: Path, deep: PreTrainedModel, save: Save) -> None:
    other = save(deep, r=2, target_modules=ATTENTION)
    assert_refused(
        [plain, other],
        r"layers\.0\.self_attn\.q_proj must have one shape in all adapters; .* has 32x32 and .* has 16x16: they belong",
    )


def test_a_path_that_is_linear_here_and_an_embedding_there_is_refused(plain: Path, tmp_path: Path) -> None:
    other = shutil.copytree(plain, tmp_path / "other")
    for letter in "AB":
        rename_keys(other, f"lora_{letter}.weight", f"lora_embedding_{letter}")
    assert_refused([plain, other], r"must be of one kind.*other has it as an embedding and .*adapter-0 as a linear mod")


@pytest.mark.parametrize(
    "new",
    [
        "base_model.model.layers",
        "base_model.model._orig_mod.model.layers",
        "base_model.model.module.model.layers",
        "base_model.model.model.language_model.layers",
        "base_model.model.model.layers.0._orig_mod",
    ],
)
def test_one_module_under_two_names_is_refused(plain: Path, network: PreTrainedModel, save: Save, new: str) -> None:
    other = save(network, r=3, target_modules=ATTENTION)
    old = "base_model.model.model.layers" + (".0" if ".0" in new else "")
    rename_keys(other, old, new)
    prefix = new.removeprefix("base_model.model.").replace(".", r"\.")
    assert_refused([plain, other], rf"must name modules alike;.* {prefix}.* \(.*adapter-1\).*look like one module")
    assert_refused([other, plain], r"must name modules alike; .* and .*: load each adapter on its base with current")
    # One adapter alone changes what it says it changes.
    merge([other], out=other.parent / "alone")


def test_an_adapter_of_a_model_without_its_head_is_refused_beside_one_of_the_whole(
    network: PreTrainedModel, save: Save
) -> None:
    folders = [save(model, r=2, target_modules=ATTENTION) for model in (network, network.model)]
    assert_refused(folders, r"model\.layers\.0\.self_attn\.q_proj \(.*adapter-0\)")


def test_names_of_older_versions_of_transformers_are_refused_beside_current_ones(
    llava: PreTrainedModel, save: Save, tmp_path: Path
) -> None:
    new = save(llava, r=2, std=0.3, target_modules=r".*language_model.*q_proj")
    old = rename_keys(
        shutil.copytree(new, tmp_path / "old"), "model.language_model.layers", "language_model.model.layers"
    )
    # For stock PEFT they are one and the same.
    assert torch.equal(logits(loaded(llava, new)), logits(loaded(llava, old)))
    assert (logits(loaded(llava, new)) - logits(llava)).abs().max() > 0.01
    assert_refused([new, old], r"language_model\.model\.layers\.0\.self_attn\.q_proj \(.*old\)")


def test_modules_of_one_model_whose_names_are_alike_are_no_two_names_of_one(
    llava: PreTrainedModel, deep: PreTrainedModel, save: Save, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)).eval()
    for number, (network, targets) in enumerate(
        (
            (t5, (r"encoder.*SelfAttention\.q", r"decoder.*SelfAttention\.q")),
            (llava, (r".*language_model.*q_proj", r".*vision_tower.*q_proj")),
            (deep, (r".*layers\.1\..*q_proj", r".*layers\.(0|11)\..*q_proj")),
        )
    ):
        folders = [save(network, r=2, target_modules=target) for target in targets]
        merge(folders, exact=True, method="sum", out=tmp_path / f"out-{number}")
        expected = dense_sum([deltas(network, folder) for folder in folders], (1, 1))
        assert_same_changes(deltas(network, tmp_path / f"out-{number}"), expected)
    # An adapter that has modules under both names says that they are two.
    for name, paths in (("one", ["model.0.proj"]), ("other", ["0.proj"]), ("both", ["model.1.proj", "1.proj"])):
        adapter = {path: LoraFactors(torch.ones(1, 3), torch.ones(2, 1), 1.0) for path in paths}
        write_adapter(tmp_path / name, adapter, "base")
    assert_refused([tmp_path / "one", tmp_path / "other"], "must name modules alike")
    result = merge([tmp_path / name for name in ("one", "other", "both")], out=tmp_path / "two")
    assert [module.path for module in result.modules] == ["0.proj", "model.0.proj", "1.proj", "model.1.proj"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(mixed: list[Path], value: float) -> None:
    path = mixed[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[key][3, 1] = value
    save_file(tensors, path)
    assert_refused(mixed, rf"adapter-1: {key} must be finite; it holds NaN or infinity")


def test_finite_values_that_are_out_of_all_scale_are_merged_or_named(tmp_path: Path) -> None:
    huge = LoraFactors(torch.full((1, 3), 3e38), torch.full((2, 1), 3e38), 1.0)
    write_adapter(tmp_path / "huge", {"layer": huge}, "base")
    merge([tmp_path / "huge"], out=tmp_path / "same")
    merged = read_adapter(tmp_path / "same")["layer"]
    np.testing.assert_allclose(merged.delta().numpy(), huge.delta().numpy(), rtol=1e-6)
    assert_refused([tmp_path / "huge"], "layer", method="sum", weights=[100.0])


def test_files_that_are_broken_are_refused(plain: Path) -> None:
    weights, config = plain / "adapter_model.safetensors", plain / "adapter_config.json"
    whole, settings_text = weights.read_bytes(), config.read_text()
    for content in (b"", b"torn", whole[: len(whole) // 2], whole[:40], b"\xff" * 8 + whole[8:], whole + b"more"):
        weights.write_bytes(content)
        assert_refused([plain], "adapter_model.safetensors is not a whole safetensors file")
    weights.write_bytes(whole)
    for text, match in (
        ("{", "must be JSON"),
        ("[1]", "must hold one JSON object; got list"),
        (settings_text.replace('"r": 2', '"r": 3'), "has factors of rank 2, but adapter_config.json says 3"),
        (settings_text.replace('"r": 2', '"r": null'), "r must be a number in adapter_config.json; got None"),
        (settings_text.replace('"lora_alpha": 8', '"lora_alpha": NaN'), "lora_alpha must be a number"),
        (settings_text.replace('"rank_pattern": {}', '"rank_pattern": [1]'), "rank_pattern must map patterns"),
        (settings_text.replace('"alpha_pattern": {}', '"alpha_pattern": {"(": 1}'), "no regular expression"),
        (settings_text.replace('"rank_pattern": {}', '"rank_pattern": {"q": "2"}'), "rank_pattern of q must be a numb"),
        (settings_text.replace('"r": 2', f'"r": {10**400}'), "r must be a number in adapter_config.json; got 1000"),
        (settings_text.replace('"lora_alpha": 8', f'"lora_alpha": {10**400}'), "lora_alpha must be a number"),
        (
            settings_text.replace('"alpha_pattern": {}', f'"alpha_pattern": {{"q": {10**400}}}'),
            "alpha_pattern of q must",
        ),
        (settings_text.replace('"rank_pattern": {}', '"rank_pattern": {"a{99999999999}": 2}'), "no regular expression"),
        (settings_text.replace('"use_rslora": false', '"use_rslora": "false"'), "use_rslora must be true or false in"),
        (settings_text.replace('"fan_in_fan_out": false', '"fan_in_fan_out": "no"'), "must be true or false in .*'no'"),
        (
            settings_text.replace('"auto_mapping": {', '"auto_mapping": 3, "was": {'),
            "auto_mapping must be an object or nu",
        ),
        (settings_text.replace('"task_type": null', '"task_type": [1]'), r"task_type must be text in .*; got \[1\]"),
        ("[" * 100_000, "must be JSON"),
    ):
        assert text != settings_text
        config.write_text(text)
        assert_refused([plain], match)


EMBEDDING = "base_model.model.model.embed_tokens.weight"


def test_copies_of_embeddings_are_taken_over_whatever_a_model_calls_them(
    gpt2: PreTrainedModel, save: Save, tmp_path: Path
) -> None:
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "embeddings": True}
    folders = [save(gpt2, r=rank, **config) for rank in (2, 3)]
    copies = {key for key in load_file(folders[0] / "adapter_model.safetensors") if "lora_" not in key}
    assert "base_model.model.transformer.wte.weight" in copies
    result = merge(folders, exact=True, out=tmp_path / "out")
    assert copies <= load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert any("were taken over as they are" in note for note in result.notes)
    expected = dense_sum([deltas(gpt2, folder) for folder in folders], (0.5, 0.5))
    assert_same_changes(deltas(gpt2, tmp_path / "out"), expected)


def test_tensors_that_are_no_pair_of_matrices_are_refused(plain: Path) -> None:
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
        ({"base_model.model.x.lora_magnitude_vector": torch.ones(2)}, "only LoRA factors of linear modules and embedd"),
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


def test_pickles_and_folders_that_are_no_adapters_are_refused(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused([tmp_path / "empty"], "must be a PEFT adapter folder with adapter_config.json and adapter_model")
    assert_refused([tmp_path / "nowhere"], "nowhere must be a PEFT adapter folder")
    (plain / "adapter_model.safetensors").rename(plain / "adapter_model.bin")
    assert_refused([plain], "adapter_model.bin is a pickle, which can run code when it is read")


def test_a_name_that_reads_like_a_hub_id_is_asked_for_there(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    pickled = shutil.copytree(plain, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repo_id, name: name == "adapter_model.bin")

    def download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        if repo_id == "us/here":
            return str(plain)
        if repo_id == "us/pickled":
            return str(pickled)
        raise OSError("offline\nmuch more text")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    result = merge(["us/here"], out=tmp_path / "out")
    assert result.adapters == ("us/here",)
    assert asked == [("us/here", ["adapter_config.json", "adapter_model.safetensors"])]
    with pytest.raises(AdapterError, match=r"^us/gone is no local folder, and the hub did not give it \(offline\)$"):
        merge(["us/gone"], out=tmp_path / "other")
    with pytest.raises(AdapterError, match="must be a PEFT adapter folder"):
        merge(["./us/gone"], out=tmp_path / "other")
    assert len(asked) == 2
    with pytest.raises(AdapterError, match=r"^us/pickled: weights must be in .*; adapter_model.bin is a pickle"):
        merge(["us/pickled"], out=tmp_path / "other")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs somebody who may not read every file")
def test_files_that_must_not_be_read_are_named_as_such(plain: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (plain / name).chmod(0)
        with pytest.raises(PermissionError, match=f"Permission denied: .*{name}"):
            merge([plain], out=plain.parent / "out")
        (plain / name).chmod(0o644)


def test_all_adapters_that_cannot_be_read_are_reported_at_once(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        merge([plain, *(tmp_path / f"gone-{number}" for number in range(12))], out=tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 11
    assert "gone-0" in lines[0] and lines[-1] == "and 2 more"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": [1]}, "weights must be one per adapter, 2 here; got 1"),
        ({"weights": [1, -1]}, r"must be finite and positive for method=mean \(use sum for signed ones\); got 1, -1"),
        ({"weights": [1, 0], "method": "sum"}, "must be finite and other than 0; got 1, 0"),
        ({"weights": [1, float("nan")]}, "weights must be finite"),
        ({"weights": [1, None]}, r"weights must be numbers, one per adapter, as \[3, 1\]; got \[1, None\]"),
        ({"weights": "12"}, "weights must be numbers, .*; got '12'"),
        ({"weights": [1, "2"]}, "weights must be numbers"),
        ({"weights": [1, 10**400]}, "weights must be numbers"),
        ({"weights": 2.0}, "weights must be numbers, .*; got 2.0"),
        ({"method": "ties"}, "method must be one of mean, sum; got ties"),
        ({"missing": "skip"}, "missing must be one of zero, renormalise; got skip"),
        ({"accuracy": "perfect"}, "accuracy must be one of exact, fast; got perfect"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got int8"),
        ({"missing": "renormalise", "method": "sum"}, "use method=mean"),
        ({"rank": 2, "exact": True}, "only one of rank, energy and exact"),
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1; got 2.0"),
        ({"rank": "3"}, "rank must be a whole number of at least 1; got '3'"),
        ({"rank": True}, "rank must be a whole number of at least 1; got True"),
        ({"energy": 1.5}, "energy must be a share above 0 and up to 1; got 1.5"),
        ({"energy": "0.9"}, "energy must be a share above 0 and up to 1; got '0.9'"),
        ({"device": "abacus"}, "device must be cpu, cuda or cuda:N; got abacus"),
        ({"device": "meta"}, "device must be cpu, cuda or cuda:N; got meta"),
        ({"device": "cuda:99"}, "device cuda:99 is not there; use cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_requests_that_make_no_sense_are_refused(plain: Path, options: dict[str, object], match: str) -> None:
    assert_refused([plain, plain], match, **options)


def test_nothing_to_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="at least one adapter"):
        merge([], out=tmp_path / "out")
    with pytest.raises(MergeError, match="adapters must be a list of folders or hub ids; got only one"):
        merge("one", out=tmp_path / "out")


# What is left behind


def test_a_folder_that_exists_is_never_touched(plain: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(MergeError, match="out must not exist yet"):
        merge([plain], out=target)
    target.rmdir()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(MergeError, match=r"out must not exist yet; .*link does"):
        merge([plain], out=tmp_path / "link")
    (tmp_path / "link").unlink()
    weights = plain / "adapter_model.safetensors"
    with pytest.raises(MergeError, match=r"safetensors, a parent of out, must be a folder; got out=.*"):
        merge([plain], out=weights / "parent" / "out")

    def appear(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "thesis.txt").write_text("years of work")

    with pytest.raises(OSError, match="out cannot be written, and nothing of it was: Directory not empty"):
        merge([plain], out=target, notify=appear)
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-0", "out"]


def test_a_full_disk_is_named_and_leaves_nothing(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(spool: TensorSpool, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorSpool, "write", full)
    with pytest.raises(OSError, match="out cannot be written, and nothing of it was: No space left on device"):
        merge([plain], out=tmp_path / "out")
    with pytest.raises(OSError, match="out cannot be written, and nothing of it was: No space left on device"):
        merge([plain], out=tmp_path / "new" / "deep" / "out")
    assert list(tmp_path.iterdir()) == [plain]
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="No space left on device"):
        merge([plain], out=tmp_path / "mine" / "new" / "out")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_name_as_long_as_names_may_be_can_be_written(plain: Path, tmp_path: Path) -> None:
    merge([plain], out=tmp_path / ("n" * 255))


def test_an_interruption_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert list(tmp_path.iterdir()) == [plain]
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([plain], out=tmp_path / "parent" / "out", notify=interrupt)
    assert list(tmp_path.iterdir()) == [plain]


def test_equal_merges_give_equal_bytes_and_the_order_of_adapters_hardly_matters(
    network: PreTrainedModel, mixed: list[Path], tmp_path: Path
) -> None:
    for name, folders in (("one", mixed), ("two", mixed), ("turned", mixed[::-1])):
        merge(folders, exact=True, out=tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert_same_changes(deltas(network, tmp_path / "turned"), deltas(network, tmp_path / "one"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files where the system lists them")
def test_open_adapters_hold_no_file_descriptors_and_no_copies(plain: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    managers = [open_adapter(plain) for _ in range(40)]
    adapters = [manager.__enter__() for manager in managers]
    factors = [adapter.factors("model.layers.0.self_attn.q_proj") for adapter in adapters]
    assert len(os.listdir("/proc/self/fd")) == before
    mapped = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in mapped
        if line.endswith(str(plain / "adapter_model.safetensors"))
    ]
    for pair in factors:
        assert any(low <= pair.A.data_ptr() < high for low, high in ranges)
    for manager in managers:
        manager.__exit__(None, None, None)


def test_the_result_tells_everything_as_plain_values(mixed: list[Path], tmp_path: Path) -> None:
    result = merge(mixed, rank=2, out=tmp_path / "out")
    plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert plain["adapters"] == [str(folder) for folder in mixed]
    assert plain["energy_kept"] == pytest.approx(result.energy_kept)
    module = next(module for module in plain["modules"] if module["path"] == "model.layers.1.self_attn.q_proj")
    assert (module["num_adapters"], module["smallest_rank"], module["largest_rank"]) == (3, 3, 9)
    assert (module["total_rank"], module["rank"], module["shape"]) == (16, 2, [32, 32])
    assert module["certificate"]["error"] >= module["certificate"]["optimal"] > 0
    assert plain["modules"][0]["path"].endswith("layers.0.self_attn.q_proj")


def test_the_command_line_offers_every_method() -> None:
    assert get_args(get_type_hints(cli.merge)["method"]) == tuple(COEFFICIENTS)


def test_a_read_back_result_can_be_merged_again(mixed: list[Path], tmp_path: Path) -> None:
    merge(mixed, exact=True, out=tmp_path / "one")
    merge([tmp_path / "one"], exact=True, out=tmp_path / "two")
    first: AdapterState = read_adapter(tmp_path / "one")
    second = read_adapter(tmp_path / "two")
    assert first.keys() == second.keys()
    for path, factors in first.items():
        torch.testing.assert_close(second[path].delta(), factors.delta(), rtol=1e-5, atol=1e-7)
    shutil.rmtree(tmp_path / "one")
