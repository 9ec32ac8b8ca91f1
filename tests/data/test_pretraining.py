"""The embedded base: what it has seen can be told from the text alone, and its folder is complete and small."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from flexlora.data import pretraining
from flexlora.data.generated.tasks import all_tasks
from flexlora.data.pretraining import (
    BASE_FOLDER,
    EMBEDDED_BASE,
    INSTANCES_FILE,
    TASKS_FILE,
    instance_hash,
    is_embedded_base,
    resolve_base_model,
    seen_in_pretraining,
)


@cache
def base_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE_FOLDER, local_files_only=True)


def test_the_base_in_the_package_has_a_public_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("embedded", EMBEDDED_BASE, str(BASE_FOLDER), f"{BASE_FOLDER}/"):
        assert is_embedded_base(name)
        assert AutoTokenizer.from_pretrained(resolve_base_model(name), local_files_only=True).vocab_size == 2560
    assert not is_embedded_base("org/model") and resolve_base_model("org/model") == "org/model"
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_base_model("~/llama") == "/home/me/llama"


def test_instance_hash_is_the_same_on_every_machine() -> None:
    # Computed once with `b2sum -l 64` over the bytes "Say it.\0a cat".
    assert instance_hash("Say it.", "a cat") == 0xFD8DCFDCE43F0211
    assert instance_hash("Say it.\n", " a cat ") == instance_hash("Say it.", "a cat")
    assert instance_hash("Say it.a", " cat") != instance_hash("Say it.", "a cat")


def test_a_renamed_copy_of_a_pretraining_task_is_still_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"Definition": ["Name the colour."], "Instances": [{"input": f"thing {n}"} for n in range(5)]}
    hashes = [instance_hash(task["Definition"][0], item["input"]) for item in task["Instances"][2:4]]
    np.save(tmp_path / INSTANCES_FILE, np.array(hashes, dtype=np.uint64))
    monkeypatch.setattr(pretraining, "BASE_FOLDER", tmp_path)
    pretraining._seen_hashes.cache_clear()
    renamed = tmp_path / "task9999_nothing_to_see.json"
    renamed.write_text(json.dumps(task))
    again = json.loads(renamed.read_text())
    try:
        assert seen_in_pretraining(again["Definition"][0], (item["input"] for item in again["Instances"]))
        assert not seen_in_pretraining(again["Definition"][0], ["thing 0", "thing 1"])
        assert not seen_in_pretraining("Name the shape.", (item["input"] for item in again["Instances"]))
    finally:
        pretraining._seen_hashes.cache_clear()


def test_the_package_lists_its_pretraining_tasks_and_their_instances() -> None:
    listing = json.loads((BASE_FOLDER / TASKS_FILE).read_text(encoding="utf-8"))
    assert len(listing) >= 200
    hashes = np.load(BASE_FOLDER / INSTANCES_FILE, allow_pickle=False)
    assert hashes.dtype == np.uint64
    assert len(np.unique(hashes)) == len(hashes) > 10_000


def test_no_generated_task_counts_as_seen_natural_text() -> None:
    for task in all_tasks()[::50]:
        assert not seen_in_pretraining(task.definition, [item["input"] for item in task.instances(5, 0)])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_comes_back_from_its_tokens(text: str) -> None:
    tokenizer = base_tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_tokenizer_puts_a_start_token_and_knows_the_roles() -> None:
    tokenizer = base_tokenizer()
    assert tokenizer("cat")["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 0
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<s><|user|>\nHello\n<|assistant|>\n"
    assert tokenizer("<|user|>", add_special_tokens=False)["input_ids"] == [tokenizer.convert_tokens_to_ids("<|user|>")]


def test_the_base_loads_offline_generates_and_is_small() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, local_files_only=True)
    tokenizer = base_tokenizer()
    assert sum(path.stat().st_size for path in BASE_FOLDER.glob("*.safetensors")) <= 12_000_000
    config = model.config
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.intermediate_size not in (config.hidden_size, 2 * config.hidden_size)
    assert len(tokenizer) == config.vocab_size
    prompt = tokenizer("one, two, three, four,", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert written.shape[1] == prompt["input_ids"].shape[1] + 2
    assert tokenizer.decode(written[0], skip_special_tokens=True).startswith("one, two, three, four,")
