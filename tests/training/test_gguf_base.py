"""Base models in GGUF files, written here with llama.cpp's own package from weights that are known."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import flexlora
from flexlora.adapters.folder import read_adapter
from flexlora.data.pretraining import BASE_FOLDER
from flexlora.training.base_model import load_base_model, load_empty_model
from flexlora.training.linear_modules import ModelError

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

HEADS, KV_HEADS, LAYERS, WIDTH = 4, 2, 2, 64
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flexlora"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2560,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in which llama.cpp keeps queries and keys: halves of a head interleaved."""
    out_features, in_features = weight.shape
    return weight.reshape(heads, 2, out_features // heads // 2, in_features).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, blocks: str = "F32", architecture: str = "llama", **facts) -> Path:
    """Write a Llama with the tokenizer of the base in the package."""
    tokenizer = json.loads((BASE_FOLDER / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = [special.get(number, token) for token, number in vocabulary]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number in special else 1 for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, value in facts.items():
        key = name.replace("__", ".")
        writer.add_uint16(key, value) if isinstance(value, int) else writer.add_string(key, value)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if name == "lm_head.weight":  # tied
            continue
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            its_name = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}[name]
        else:
            _, _, layer, path_in_layer = name.removesuffix(".weight").split(".", 3)
            its_name = f"blk.{layer}.{NAMES[path_in_layer]}"
            if path_in_layer.endswith(("q_proj", "k_proj")):
                array = turned(array, HEADS if path_in_layer.endswith("q_proj") else KV_HEADS)
        if blocks != "F32" and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[blocks]
            writer.add_tensor(f"{its_name}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{its_name}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_tokens_and_chat_template_are_those_of_the_file(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    loaded, tokenizer = load_base_model(str(file), dtype="float32", device="cpu")
    for name, weight in llama.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    expected = AutoTokenizer.from_pretrained(BASE_FOLDER)
    text = "The 12 answers\nare in Käthe's bag."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == expected(text, add_special_tokens=False)["input_ids"]
    conversation = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == "user: hello</s>"
    tokens = torch.tensor([ids])
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, llama(tokens).logits, atol=1e-6)


@pytest.mark.parametrize("blocks", ["Q8_0", "Q4_0", "Q5_1", "F16"])
def test_blocks_are_unpacked_as_the_package_of_the_format_does(
    llama: LlamaForCausalLM, tmp_path: Path, blocks: str
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama, blocks)
    loaded, _ = load_base_model(str(file), dtype="float32", device="cpu")
    kind, weight = (
        gguf.GGMLQuantizationType[blocks],
        llama.get_parameter("model.layers.1.mlp.down_proj.weight").detach().numpy(),
    )
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    found = loaded.get_parameter("model.layers.1.mlp.down_proj.weight").numpy()
    assert np.array_equal(found, expected)
    assert 0 < np.abs(found - weight).max() < 0.05


def test_a_file_is_unpacked_once_for_each_precision(
    llama: LlamaForCausalLM, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    load_empty_model(str(file))
    assert "GGUF tensors" not in capsys.readouterr().err
    (folder,) = cache.glob("gguf-*")
    assert hashlib.sha256(file.read_bytes()).hexdigest()[:32] in folder.name
    written = (folder / "model.safetensors").stat().st_mtime_ns
    shutil.copy(file, tmp_path / "copy.GGUF")
    load_base_model(str(tmp_path / "copy.GGUF"), dtype="float32", device="cpu")
    assert [path.stat().st_mtime_ns for path in cache.glob("gguf-*/model.safetensors")] == [written]
    halved, _ = load_base_model(str(file), dtype="bfloat16", device="cpu")
    assert halved.dtype == torch.bfloat16 and len(list(cache.glob("gguf-*"))) == 2


@pytest.mark.parametrize("damage", ["cut", "gone", "sealed wrongly"])
def test_a_damaged_folder_is_made_again(llama: LlamaForCausalLM, tmp_path: Path, cache: Path, damage: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    load_empty_model(str(file))
    (folder,) = cache.glob("gguf-*")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "gone":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "gguf_source.json").write_text('{"sizes": {}}')
    loaded, _ = load_base_model(str(file), dtype="float32", device="cpu")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], llama.state_dict()["model.norm.weight"])


def test_folders_used_longest_ago_go(llama: LlamaForCausalLM, tmp_path: Path, cache: Path) -> None:
    for number in range(6):
        load_empty_model(str(write_gguf(tmp_path / f"{number}.gguf", llama, general__name=str(number))))
    assert len(list(cache.glob("gguf-*"))) == 4


def test_what_was_unpacked_is_saved_by_stock_transformers(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    loaded, tokenizer = load_base_model(
        str(write_gguf(tmp_path / "tiny.gguf", llama, "Q8_0")), dtype="float32", device="cpu"
    )
    loaded.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: fetch the file again"),
        (b"<!doctype html>", "begins with b'<!do': fetch the file again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"GGUF\x03\0\0\0" + 40 * b"\xff", "cut short or damaged"),
    ],
)
def test_what_is_no_gguf_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_empty_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"general__type": "adapter"}, "holds an adapter; name the base model"),
        ({"general__type": "mmproj"}, "'llama' of type 'mmproj'"),
        ({"architecture": "clip"}, "'clip' of type 'model'"),
        ({"architecture": "rwkv7"}, "rwkv7"),
        ({"split__count": 3}, "one of 3 parts.*llama-gguf-split --merge"),
    ],
)
def test_what_is_no_whole_language_model_is_refused(
    llama: LlamaForCausalLM, tmp_path: Path, cache: Path, facts: dict, message: str
) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama, **facts)
    with pytest.raises(ModelError, match=message):
        load_empty_model(str(file))
    assert not list(cache.glob("*"))


def test_a_file_that_is_cut_short_is_refused(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama)
    file.write_bytes(file.read_bytes()[:-20_000])
    with pytest.raises(ModelError, match="cut short or damaged"):
        load_empty_model(str(file))


def test_a_file_that_is_not_there_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"there is no file .*nothing\.gguf; one on the hub is called"):
        load_empty_model(str(tmp_path / "nothing.gguf"))
    with pytest.raises(ModelError, match="the hub gives none of the repository us/model"):
        load_empty_model("us/model/model-q4.gguf")


def test_without_the_package_the_way_to_it_is_said(
    llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "model.gguf", llama)
    monkeypatch.setattr("flexlora.training.gguf_base.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'flexlora\[gguf\]'"):
        load_empty_model(str(file))


@pytest.mark.integration
def test_a_run_on_a_gguf_file_ends_with_an_adapter_and_a_whole_model(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    result = flexlora.run(
        "demo",
        tmp_path / "run",
        model__name_or_path=str(file),
        data={"num_clients": 6, "examples_per_task": 14, "num_unseen_tasks": 2},
        rounds={"num_rounds": 1, "cohort_size": 2},
        evaluation={
            "rank_group_clients": 0,
            "local_only_clients": 0,
            "fedit_reference": False,
            "fedit_largest_reference": False,
            "large_alone_reference": False,
        },
        quiet=True,
    )
    adapter = result.export(tmp_path / "adapter", rank=4)
    card = (adapter / "README.md").read_text()
    assert "base_model: tiny.gguf" in card and 'gguf_file="tiny.gguf"' in card and str(tmp_path) not in card
    whole = AutoModelForCausalLM.from_pretrained(result.export(tmp_path / "whole", rank=4, merged=True))
    path = "model.layers.1.mlp.up_proj"
    factors = read_adapter(adapter)[path]
    before, after = (model.get_parameter(f"{path}.weight").detach() for model in (llama, whole))
    assert torch.allclose(after.double(), before + factors.delta(), atol=1e-7)
    assert not torch.equal(after, before)
