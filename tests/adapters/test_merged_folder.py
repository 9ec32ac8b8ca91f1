"""The folder of a merge, as stock PEFT reads it."""

import copy
import errno
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
)
from safetensors.torch import load_file
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from flexlora.adapters.folder import read_adapter
from flexlora.adapters.merge import merge
from flexlora.adapters.tensor_file import TensorSpool
from flexlora.adapters.together import MergeError
from flexlora.adapters.write import write_adapter
from flexlora.lora.factors import LoraFactors

ATTENTION = ["q_proj", "v_proj"]
Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]


def test_names_that_chose_the_modules_are_kept_where_they_tell_exactly_which(
    network: PreTrainedModel,
    mixed: list[Path],
    save: Save,
    tmp_path: Path,
    loaded: Helper,
    lora_layers: Helper,
    config_of: Helper,
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


def test_repeated_layers_are_repeated_in_the_result(
    network: PreTrainedModel, save: Save, tmp_path: Path, deltas: Helper, dense_sum: Helper, assert_same_changes: Check
) -> None:
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
    network: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    logits: Helper,
    loaded: Helper,
    rewrite: Helper,
    config_of: Helper,
) -> None:
    network.save_pretrained(tmp_path / "base")
    folders = [save(network, r=rank, target_modules=ATTENTION) for rank in (2, 3)]
    for folder in folders:
        rewrite(folder, base_model_name_or_path=str(tmp_path / "base"))
    merge(folders, exact=True, out=tmp_path / "out")
    alone = AutoPeftModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(alone), logits(loaded(network, tmp_path / "out")))
    # What one says and the other leaves out is no contradiction.
    auto_mapping = config_of(folders[0])["auto_mapping"]
    rewrite(folders[0], auto_mapping=None, task_type="CAUSAL_LM")
    for number, order in enumerate((folders, folders[::-1])):
        merge(order, out=tmp_path / f"half-{number}")
        config = config_of(tmp_path / f"half-{number}")
        assert (config["auto_mapping"], config["task_type"]) == (auto_mapping, "CAUSAL_LM")
        found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / f"half-{number}").eval()
        torch.testing.assert_close(logits(found), logits(loaded(network, tmp_path / f"half-{number}")))
    rewrite(folders[1], auto_mapping=None, task_type="FEATURE_EXTRACTION")
    notes = merge(folders, out=tmp_path / "unclear").notes
    assert config_of(tmp_path / "unclear")["task_type"] is None
    one, other = (folder.name for folder in folders)
    said = rf"task_type is CAUSAL_LM in .*{one} and FEATURE_EXTRACTION in .*{other}; the result has none"
    assert [note for note in notes if re.match(said, note)]


def test_what_adapters_contradict_one_another_in_is_named(
    plain: Path, tmp_path: Path, rewrite: Helper, config_of: Helper
) -> None:
    other = shutil.copytree(plain, tmp_path / "other")
    silent = shutil.copytree(plain, tmp_path / "silent")
    library = "transformers.models.llama.modeling_llama"
    for folder, name in ((plain, "LlamaModel"), (other, "LlamaForCausalLM")):
        rewrite(folder, task_type=None, auto_mapping={"base_model_class": name, "parent_library": library})
    rewrite(silent, task_type=None, auto_mapping=None)
    notes = merge([silent, plain, other], out=tmp_path / "out").notes
    said = (
        rf"auto_mapping is LlamaModel, {library} in .* and LlamaForCausalLM, {library} in .*other; the result has none"
    )
    assert [note for note in notes if re.match(said, note)] and not any("task_type" in note for note in notes)
    assert config_of(tmp_path / "out")["auto_mapping"] is None
    assert not any("the result has none" in note for note in merge([silent, plain], out=tmp_path / "agree").notes)


# PEFT itself adds the pattern for the fused experts that it does not find then.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("layout", ["uniform", "exact"])
@pytest.mark.parametrize("choice", [{}, {"exact": True}, {"energy": 0.9}, {"rank": 3}], ids=str)
def test_experts_get_one_rank_so_that_stock_peft_can_fuse_them(
    tmp_path: Path, choice: dict[str, object], layout: str, logits: Helper, loaded: Helper
) -> None:
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
    result = merge([tmp_path / "0", tmp_path / "1"], method="sum", ranks=layout, out=tmp_path / "out", **choice)
    ranks = {module.path: module.stored_rank for module in result.modules}
    assert len({rank for path, rank in ranks.items() if "experts" in path}) == 1
    assert any("got directions without effect up to rank" in note for note in result.notes)
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_read_as_it_is_and_written_where_asked(
    network: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    dtype: str,
    deltas: Helper,
    dense_sum: Helper,
    assert_same_changes: Check,
) -> None:
    folders = [save(network, r=rank, dtype=getattr(torch, dtype), target_modules=ATTENTION, std=0.3) for rank in (2, 5)]
    expected = dense_sum([deltas(network, folder) for folder in folders], (0.5, 0.5))
    merge(folders, exact=True, out=tmp_path / "float32")
    assert_same_changes(deltas(network, tmp_path / "float32"), expected)
    merge(folders, exact=True, dtype=dtype, out=tmp_path / dtype)
    written = load_file(tmp_path / dtype / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert_same_changes(deltas(network, tmp_path / dtype), expected, rtol=0.01 if dtype == "bfloat16" else 2e-3)


def test_values_beyond_the_type_asked_for_are_refused(tmp_path: Path, assert_refused: Check) -> None:
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


def test_copies_of_embeddings_are_taken_over_whatever_a_model_calls_them(
    gpt2: PreTrainedModel, save: Save, tmp_path: Path, deltas: Helper, dense_sum: Helper, assert_same_changes: Check
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
