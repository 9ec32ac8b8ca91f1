"""Reads an ``adapter_config.json`` and refuses settings under which the factors mean more than ``scaling * B @ A``."""

from collections.abc import Mapping
from functools import lru_cache
from math import isfinite
from numbers import Real
from operator import index
from pathlib import Path
from typing import Any, TypeGuard

from flexlora.adapters.peft_format import CONFIG_FILE, INTO_THE_BASE, PICKLE_FILE, WEIGHTS_FILE, AdapterError
from flexlora.adapters.wrong_folder import what_it_is, wrong_content
from flexlora.foreign import ForeignError, read_json
from flexlora.patterns import PatternError, bounded_pattern

REFUSED = {
    "alora_invocation_tokens": f"aLoRA is active only after its invocation tokens; {INTO_THE_BASE}",
    "arrow_config": "Arrow chooses between adapters at every token; merge the adapters that it routes to",
    "kasa_config": f"KaSA changes the base weights too; {INTO_THE_BASE}",
    "megatron_config": "factors of Megatron layers are stored in parts; save it from a model that is in one piece",
    "monteclora_config": f"MonteCLoRA samples around its factors; {INTO_THE_BASE}",
    "target_parameters": f"factors of stacked experts are no product of two matrices; {INTO_THE_BASE}",
    "use_bdlora": f"BD-LoRA stores block-diagonal factors; {INTO_THE_BASE}",
    "use_dora": f"DoRA rescales the columns of the whole weight; {INTO_THE_BASE}",
    "use_qalora": f"QA-LoRA pools its inputs; {INTO_THE_BASE}",
    "velora_config": "VeLoRA keeps training state among the weights; save it from PEFT as plain LoRA",
}
"""Setting -> why an adapter that sets it is no sum of products, and what to do instead."""


WHOLE_WEIGHTS = (
    f"whole weights were trained beside the factors (modules_to_save): {INTO_THE_BASE}; if mergekit extracted it, "
    "leave these modules out with its --exclude-regex"
)
"""Why whole weights are refused."""


STORED = {
    "lora_B.bias": f"a bias behind lora_B is no part of B @ A; {INTO_THE_BASE}",
    "lora_embedding_B.bias": f"a bias behind lora_B is no part of B @ A; {INTO_THE_BASE}",
    "bias": f"biases were trained beside the factors; {INTO_THE_BASE}",
    "lora_magnitude_vector": f"DoRA rescales the columns of the whole weight; {INTO_THE_BASE}",
    "trainable_tokens_delta": f"single token embeddings were trained beside the factors; {INTO_THE_BASE}",
    "trainable_tokens_original": f"single token embeddings were trained beside the factors; {INTO_THE_BASE}",
}
"""Ending of a tensor's name -> why an adapter that holds such a tensor is no sum of products."""


JUDGED_BY_CONTENT = frozenset({"bias", "lora_bias", "modules_to_save", "trainable_token_indices"})
"""Settings that mean something only where tensors are stored for them, and are judged by these."""


UNDERSTOOD = JUDGED_BY_CONTENT | frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layer_replication layers_pattern "
    "layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core peft_type peft_version "
    "qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora".split()
)
"""Settings that are either read here or say nothing about what the factors mean."""


Numbers = tuple[float, ...]


_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Ways to make initial factors that leave the base weights alone."""


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a number that a float can hold; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def whole_number(value: object) -> int | None:
    """Return ``value`` as an int, None where it is no whole number; True, False and 8.0 are none."""
    # torch's and numpy's truth values count as whole numbers of Python, or used to.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the configuration of a folder called ``name`` in messages.

    Raises:
        AdapterError: If a file is missing, the configuration cannot be read, or a setting is refused.
    """
    path = folder / CONFIG_FILE
    if path.is_file() and (folder / PICKLE_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise pickle_error(name)
    if not path.is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise AdapterError(
            f"{name} must be a PEFT adapter folder with {CONFIG_FILE} and {WEIGHTS_FILE}{what_it_is(folder, name)}"
        )
    if wrong := wrong_content(path):
        raise AdapterError(f"{name}: {CONFIG_FILE} {wrong}")
    try:
        config = read_json(path.read_bytes(), path)
    except ForeignError as error:
        raise AdapterError(f"{name}: {CONFIG_FILE} must be JSON ({error.reason})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{name}: {CONFIG_FILE} must hold one JSON object; got {type(config).__name__}")
    _refuse_settings(config, name)
    return config


def pickle_error(name: str) -> AdapterError:
    """Return the error of an adapter whose weights are a pickle."""
    return AdapterError(
        f"{name}: weights must be in {WEIGHTS_FILE}; {PICKLE_FILE} is a pickle, which can run code when it is read: "
        "load it with PEFT where you trust it and save it again"
    )


def _refuse_settings(config: Mapping[str, Any], name: str) -> None:
    """Raise unless every setting leaves the factors a plain product on an unchanged base."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{name}: peft_type must be LORA; got {config.get('peft_type')}")
    for key in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{name}: {key} must be text in {CONFIG_FILE}; got {config[key]!r}")
    for key in ("fan_in_fan_out", "use_rslora"):
        if config.get(key) and config[key] is not True:
            raise AdapterError(f"{name}: {key} must be true or false in {CONFIG_FILE}; got {config[key]!r}")
    if not isinstance(config.get("auto_mapping"), dict | None):
        raise AdapterError(
            f"{name}: auto_mapping must be an object or null in {CONFIG_FILE}; got {config['auto_mapping']!r}"
        )
    for key, value in sorted(config.items()):
        if value and key in REFUSED:
            raise AdapterError(f"{name}: it sets {key}: {REFUSED[key]}")
        if value and key not in UNDERSTOOD:
            raise AdapterError(
                f"{name}: it sets {key}, which is not known here; if that changes nothing about what the factors mean, "
                f"take it out of {CONFIG_FILE}"
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise AdapterError(
            f"{name}: init_lora_weights must leave the base as it is; {init} changes it at the start: save the "
            "adapter with path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def trained_whole(config: Mapping[str, Any], path: str) -> bool:
    """Return whether the configuration says that the whole weight of a module was trained."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list):
        return True
    return any(path == name or path.endswith(f".{name}") for name in names)


def numbers_of(config: Mapping[str, Any], default: str, pattern: str, paths: tuple[str, ...], name: str) -> Numbers:
    """Return the number that applies to each of ``paths``: of ``pattern`` where one matches, else the ``default``."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{name}: {pattern} must map patterns to numbers; got {patterns!r}")
    named = {f"{pattern} of {key}": value for key, value in patterns.items()}
    for what, value in {default: config.get(default), **named}.items():
        if not is_number(value):
            raise AdapterError(f"{name}: {what} must be a number in {CONFIG_FILE}; got {value!r:.60}")
    try:
        return _matched(tuple(patterns.items()), config[default], paths)
    except PatternError as error:
        raise AdapterError(
            f"{name}: {pattern} has a key that is no regular expression that can be used: {error}"
        ) from error


@lru_cache(maxsize=64)  # adapters of one run share patterns and modules
def _matched(patterns: tuple[tuple[str, float], ...], default: float, paths: tuple[str, ...]) -> Numbers:
    """Look up as PEFT does: the first pattern that matches the path from a dot on."""
    # PEFT asks for ".*\\." before the pattern, which says the same and backtracks.
    compiled = [(bounded_pattern(rf"(?:^|\.)(?:{pattern})$"), value) for pattern, value in patterns]
    return tuple(next((value for key, value in compiled if key.found_in(path)), default) for path in paths)


def plain_targets(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return ``target_modules`` where they are a list and nothing else chooses modules too."""
    targets = config.get("target_modules")
    others = [config.get(key) for key in ("exclude_modules", "layers_to_transform", "ensure_weight_tying")]
    # 0 is the first layer, not nothing.
    if not isinstance(targets, list) or any(value or (value == 0 and value is not False) for value in others):
        return None
    return tuple(sorted(str(target) for target in targets))
