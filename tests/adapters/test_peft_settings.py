"""Settings under which factors mean something else are refused by name, as stock PEFT writes them."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from transformers import (
    PreTrainedModel,
)

from flexlora.adapters.merge import merge
from flexlora.adapters.peft_settings import REFUSED, UNDERSTOOD

ATTENTION = ["q_proj", "v_proj"]
Save = Callable[..., Path]
Helper = Callable[..., Any]
Check = Callable[..., None]


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", "mica"])
def test_ways_to_start_that_leave_the_base_alone_are_taken(
    network: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    init: str,
    deltas: Helper,
    assert_same_changes: Check,
    rewrite: Helper,
) -> None:
    folder = save(network, r=4, target_modules=ATTENTION)
    rewrite(folder, init_lora_weights=init)
    merge([folder], out=tmp_path / "out")
    rewrite(folder, init_lora_weights=True)
    assert_same_changes(deltas(network, tmp_path / "out"), deltas(network, folder))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"use_dora": True}, "sets use_dora: DoRA rescales the columns"),
        ({"modules_to_save": ["lm_head"]}, r"holds .*lm_head\.weight: whole weights were trained beside .*mergekit"),
        ({"trainable_token_indices": [3, 4]}, "trainable_tokens_delta: single token embeddings were trained"),
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
    network: PreTrainedModel, save: Save, plain: Path, config: dict[str, object], match: str, assert_refused: Check
) -> None:
    folder = save(network, r=2, target_modules=ATTENTION, **config)
    assert_refused([plain, folder], f"{folder.name}.*{match}")


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_a_bias_behind_lora_b_is_refused(gpt2: PreTrainedModel, save: Save, assert_refused: Check) -> None:
    folder = save(gpt2, r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)
    assert_refused([folder], r"holds .*lora_B\.bias: a bias behind lora_B")


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_count_where_they_are_stored_and_not_where_a_setting_says_so(
    network: PreTrainedModel,
    gpt2: PreTrainedModel,
    save: Save,
    tmp_path: Path,
    bias: str,
    deltas: Helper,
    assert_same_changes: Check,
    assert_refused: Check,
    rewrite: Helper,
) -> None:
    # Llama's linear modules have no bias, so that stock PEFT stores none.
    folder = save(network, r=2, target_modules=ATTENTION, bias=bias)
    merge([folder], out=tmp_path / "out")
    assert_same_changes(deltas(network, tmp_path / "out"), deltas(network, folder))
    stored = save(gpt2, r=2, target_modules=["c_attn"], fan_in_fan_out=True, bias=bias)
    assert_refused([stored], r"holds base_model\..*\.bias: biases were trained beside the factors")
    assert_refused([rewrite(stored, bias="none")], r"\.bias: biases were trained beside the factors")


@pytest.mark.parametrize("setting", ["modules_to_save", "trainable_token_indices", "lora_bias"])
def test_settings_without_what_they_would_store_say_nothing(
    plain: Path, tmp_path: Path, setting: str, rewrite: Helper
) -> None:
    value = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3], "lora_bias": True}[setting]
    merge([rewrite(plain, **{setting: value})], out=tmp_path / "out")


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "somebodys_own"])
def test_starts_that_change_the_base_are_refused(
    plain: Path, init: str, rewrite: Helper, assert_refused: Check
) -> None:
    assert_refused([rewrite(plain, init_lora_weights=init)], f"{init} changes it at the start")


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_every_setting_that_changes_what_factors_mean_is_refused(
    plain: Path, key: str, rewrite: Helper, assert_refused: Check
) -> None:
    assert_refused([rewrite(plain, **{key: {"some": "thing"}})], f"sets {key}: ")


def test_every_setting_of_stock_peft_is_either_understood_or_refused() -> None:
    known = UNDERSTOOD | REFUSED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known
    assert not UNDERSTOOD & REFUSED.keys()


def test_a_setting_that_is_not_known_is_refused_unless_it_is_off(
    plain: Path, tmp_path: Path, rewrite: Helper, assert_refused: Check
) -> None:
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
    network: PreTrainedModel, plain: Path, tmp_path: Path, config: object, name: str, assert_refused: Check
) -> None:
    get_peft_model(copy.deepcopy(network), config).save_pretrained(tmp_path / "other", save_embedding_layers=False)
    assert_refused([plain, tmp_path / "other"], f"peft_type must be LORA; got {name}")


def test_files_that_are_broken_are_refused(plain: Path, assert_refused: Check) -> None:
    weights, config = plain / "adapter_model.safetensors", plain / "adapter_config.json"
    whole, settings_text = weights.read_bytes(), config.read_text()
    for content in (b"torn", whole[: len(whole) // 2], whole[:40], b"\xff" * 8 + whole[8:], whole + b"more"):
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
        (
            settings_text.replace('"rank_pattern": {}', '"rank_pattern": {"((.|.)+)+[!?]": 2}'),
            "takes more than 2 s to match",
        ),
        ('{"a":' * 200 + "1" + "}" * 200, "must be JSON"),
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
