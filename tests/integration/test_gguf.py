"""Adapters in GGUF, the format of llama.cpp and Ollama, through the package ``gguf``; skipped where it is missing.

``pip install gguf`` brings the names, the writer and the reader of the format. The converter itself lies in llama.cpp:
set LLAMA_CPP to a checkout of it, and the last test converts with it:

    LLAMA_CPP=~/llama.cpp pytest -m integration tests/integration/test_gguf.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flexlora.adapters.merge import merge
from flexlora.adapters.write import write_adapter
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.lora.factors import LoraFactors, Scaling

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
pytestmark = pytest.mark.integration

NUM_LAYERS = 2
PATHS = {
    f"model.layers.{layer}.{name}": (out_features, in_features)
    for layer in range(NUM_LAYERS)
    for name, out_features, in_features in (
        ("self_attn.v_proj", 64, 128),
        ("self_attn.o_proj", 128, 128),
        ("mlp.down_proj", 128, 344),
    )
}


def adapter_of(scaling: Scaling, seed: int) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    ranks = {path: 2 + (3 * place + seed) % 7 for place, path in enumerate(PATHS)}
    return {
        path: LoraFactors(
            0.3 * torch.randn(ranks[path], in_features, generator=generator),
            0.3 * torch.randn(out_features, ranks[path], generator=generator),
            scaling(ranks[path]),
        )
        for path, (out_features, in_features) in PATHS.items()
    }


def changes_in(file: Path) -> dict[str, np.ndarray]:
    """The changes as llama.cpp applies them: one alpha for the file, divided by the rank of each tensor."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    return {
        name.removesuffix(".lora_a"): alpha / A.shape[0] * (tensors[name[:-1] + "b"].astype(np.float64) @ A)
        for name, A in tensors.items()
        if name.endswith(".lora_a")
    }


def written_as_gguf(folder: Path, file: Path) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, NUM_LAYERS)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(
        "adapter.lora.alpha", float(json.loads((folder / "adapter_config.json").read_text())["lora_alpha"])
    )
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, letter = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        assert name is not None
        writer.add_tensor(f"{name}.lora_{letter.lower()}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return changes_in(file)


def expected_in_gguf(changes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, NUM_LAYERS)
    return {names.get_name(f"{path}.weight", try_suffixes=(".weight",)): change for path, change in changes.items()}


@pytest.fixture(params=["uniform", "exact"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> dict[Path, dict[str, np.ndarray]]:
    """Two folders, one written and one merged, with the changes that were put into them."""
    one, other = adapter_of(Scaling("rslora", 5.7), 0), adapter_of(Scaling("constant_alpha", 16.0), 1)
    write_adapter(tmp_path / "one", one, "us/llama", ranks=request.param)
    write_adapter(tmp_path / "other", other, "us/llama", ranks=request.param)
    merge([tmp_path / "one", tmp_path / "other"], method="sum", exact=True, ranks=request.param, out=tmp_path / "sum")
    return {
        tmp_path / "one": {path: one[path].delta().numpy() for path in PATHS},
        tmp_path / "sum": {path: (one[path].delta() + other[path].delta()).numpy() for path in PATHS},
    }


def test_one_alpha_and_the_rank_of_each_tensor_give_the_change(folders: dict[Path, dict[str, np.ndarray]]) -> None:
    for folder, changes in folders.items():
        found = written_as_gguf(folder, folder / "adapter.gguf")
        expected = expected_in_gguf(changes)
        assert found.keys() == expected.keys()
        for name, change in expected.items():
            np.testing.assert_allclose(found[name], change, atol=1e-5 * np.abs(change).max())


def test_the_fields_of_the_card_are_read(folders: dict[Path, dict[str, np.ndarray]]) -> None:
    for folder in folders:
        card = gguf.Metadata.load_model_card(folder)
        assert card["base_model"] == "us/llama" and "lora" in card["tags"]


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="set LLAMA_CPP to a checkout of llama.cpp")
def test_the_converter_of_llama_cpp_finds_the_change(folders: dict[Path, dict[str, np.ndarray]]) -> None:
    converter = Path(os.environ["LLAMA_CPP"]).expanduser() / "convert_lora_to_gguf.py"
    for folder, changes in folders.items():
        file = folder / "converted.gguf"
        command = [sys.executable, str(converter), str(folder), "--base", str(BASE_FOLDER), "--outfile", str(file)]
        subprocess.run(command, check=True, capture_output=True)
        found = changes_in(file)
        for name, change in expected_in_gguf(changes).items():
            np.testing.assert_allclose(found[name], change, atol=1e-5 * np.abs(change).max())
