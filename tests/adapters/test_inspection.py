"""What an adapter's spectrum says, against numpy and against numbers worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flexlora.adapters.inspection import ModuleSpectrum, inspect_adapter, kind_of, mean_spectrum
from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import LoraFactors


def diagonal(values: list[float], scaling: float) -> LoraFactors:
    """Factors whose change has ``scaling * values`` as singular values."""
    rank = len(values)
    return LoraFactors(
        torch.eye(rank, 6), torch.nn.functional.pad(torch.diag(torch.tensor(values)), (0, 0, 0, 3)), scaling
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter = {
        "model.layers.2.self_attn.q_proj": diagonal([3.0, 4.0], 0.5),
        "model.layers.10.self_attn.q_proj": diagonal([1.0, 1.0, 1.0], 2.0),
        "model.layers.2.mlp.experts.7.up_proj": diagonal([1.0], 3.0),
        "lm_head<&>": diagonal([0.0, 0.0], 1.0),
    }
    write_adapter(tmp_path / "adapter", adapter, "us/llama", ranks="exact")
    return tmp_path / "adapter"


def test_spectra_are_those_of_the_change_with_its_scaling(folder: Path) -> None:
    found = inspect_adapter(folder)
    assert found.base_model == "us/llama"
    modules = {module.path: module for module in found.modules}
    assert list(modules) == [
        "model.layers.2.mlp.experts.7.up_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.10.self_attn.q_proj",
        "lm_head<&>",
    ]
    q_proj = modules["model.layers.2.self_attn.q_proj"]
    np.testing.assert_allclose(q_proj.singular_values, [2.0, 1.5])
    assert (q_proj.shape, q_proj.rank, q_proj.layer, q_proj.kind) == ((5, 6), 2, 2, "self_attn.q_proj")
    assert q_proj.energy == pytest.approx(6.25)
    assert (q_proj.rank_for(0.6), q_proj.rank_for(0.65)) == (1, 2)
    assert modules["model.layers.10.self_attn.q_proj"].effective_rank == pytest.approx(3)
    head = modules["lm_head<&>"]
    assert (head.layer, head.kind, head.singular_values, head.effective_rank) == (None, "lm_head<&>", (), 0.0)
    assert head.rank_for(0.9) == 0


def test_energy_is_shared_out_by_kind_and_by_layer(folder: Path) -> None:
    found = inspect_adapter(folder)
    total = 6.25 + 12 + 9
    assert found.energy == pytest.approx(total)
    assert {kind: found.share(modules) for kind, modules in found.kinds.items()} == pytest.approx(
        {"self_attn.q_proj": 18.25 / total, "mlp.experts.*.up_proj": 9 / total, "lm_head<&>": 0.0}
    )
    assert {layer: found.share(modules) for layer, modules in found.layers.items()} == pytest.approx(
        {2: 15.25 / total, 10: 12 / total}
    )
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["norm"] == pytest.approx(total**0.5)
    assert plain["share_by_layer"]["10"] == pytest.approx(12 / total)
    assert plain["modules"][1]["rank_for_99_percent"] == 2


def test_a_random_adapter_has_the_singular_values_of_its_dense_change(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 9, generator=generator), torch.randn(7, 4, generator=generator)
    write_adapter(tmp_path / "adapter", {"layer": LoraFactors(A, B, 0.75)}, "base")
    expected = np.linalg.svd(0.75 * (B.double() @ A.double()).numpy(), compute_uv=False)[:4]
    (module,) = inspect_adapter(tmp_path / "adapter").modules
    np.testing.assert_allclose(module.singular_values, expected, rtol=1e-12)
    shares = expected / expected.sum()
    assert module.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.11.self_attn.q_proj", "self_attn.q_proj"),
        ("transformer.h.0.attn.c_attn", "attn.c_attn"),
        ("0.proj", "proj"),
        ("model.layers.3.block_sparse_moe.experts.5.w1", "block_sparse_moe.experts.*.w1"),
        ("lm_head", "lm_head"),
    ],
)
def test_kinds_are_paths_within_a_block(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def test_mean_spectra_start_at_one_and_count_what_has_ended_as_zero() -> None:
    def module(*values: float) -> ModuleSpectrum:
        return ModuleSpectrum("layer", (9, 9), len(values), 1.0, values)

    assert mean_spectrum([module(4.0, 2.0), module(8.0), module()]) == [1.0, 0.25]
    assert mean_spectrum([module()]) == []


def test_values_whose_squares_are_no_numbers_are_refused(folder: Path) -> None:
    key = "base_model.model.lm_head<&>.lora_{}.weight"
    config = json.loads((folder / "adapter_config.json").read_text()) | {"r": 1, "lora_alpha": 1, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for size, match in (
        (1e80, r"must be below 1e\+150; lm_head<&> has a norm of 2e\+160"),
        (1e160, "became NaN or inf"),
    ):
        huge = {
            key.format("A"): torch.full((1, 4), size, dtype=torch.float64),
            key.format("B"): torch.full((1, 1), size, dtype=torch.float64),
        }
        save_file(huge, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=f"^{folder}.*{match}"):
            inspect_adapter(folder)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="must be a PEFT adapter folder"):
        inspect_adapter(tmp_path)
