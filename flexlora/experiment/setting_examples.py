"""Makes an example of what was probably meant out of a value that a setting cannot have."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from flexlora.experiment.config import Config
from flexlora.experiment.setting_hints import RANKS, models_of

# Section -> the setting that a number, or else a word, in the place of the whole section stands for.
NUMBERS: Mapping[str, str] = {
    "model": "model.name_or_path",
    "ray": "ray.num_actors",
    "data": "data.num_clients",
    "clients": "data.num_clients",
    "devices": "devices.max_rank",
    "clock": "clock.deadline_seconds",
    "method": "method.name",
    "training": "training.num_epochs",
    "rounds": "rounds.num_rounds",
    "evaluation": "evaluation.every",
}
WORDS: Mapping[str, str] = {
    "model": "model.name_or_path",
    "ray": "ray.address",
    "lora": "lora.target_modules",
    "clients": "clients.types",
    "devices": "devices.profiles",
    "method": "method.name",
}
SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "model.device": {"gpu": "cuda", "nvidia": "cuda", "cuda:": "cuda", "rocm": "cuda", "hip": "cuda"},
    "model.dtype": {"fp32": "float32", "float": "float32", "32": "float32", "bf16": "bfloat16", "16": "bfloat16"},
}
DEVICES_ELSEWHERE = ("mps", "xpu", "npu", "tpu", "xla", "hpu", "directml", "vulkan")
"""Devices of torch that nothing here was tried on."""


def section_rule(section: str, given: Any, data_names: Mapping[str, Any]) -> str:
    """Return that a section is no single value, with an example made of the one given.

    Args:
        section: Its name.
        given: The value.
        data_names: The kinds of data.
    """
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    rule = "must be a section of settings"
    if section == "lora" and is_number:
        return f"{rule}, as lora.lora_alpha={given}; {RANKS}"
    if section == "data" and isinstance(given, str):
        kind = _nearest(given, tuple(data_names))
        example = f"data.name={kind}" if kind else f"data.name=instructions data.path={given}"
    elif isinstance(given, str) and (choice := _choice_anywhere(section, given)):
        example = choice
    elif section == "training" and isinstance(given, float):
        example = f"training.learning_rate={given}"
    elif is_number and section in NUMBERS:
        example = f"{NUMBERS[section]}={given}"
    elif isinstance(given, str) and section == "lora":
        example = f"{WORDS[section]}=[{given}]"
    elif isinstance(given, str) and section in WORDS:
        example = f"{WORDS[section]}={given}"
    else:
        example = _first_setting(section, data_names)
    return f"{rule}, as {example}"


def meant_value(key: str, given: Any, choices: tuple[str, ...]) -> str:
    """Return a question for what a wrong word may have meant among the choices, or an empty text."""
    if not isinstance(given, str | int) or isinstance(given, bool):
        return ""
    word = str(given).strip().lower()
    meant = SYNONYMS.get(key, {}).get(word) or _nearest(word, choices)
    return f": did you mean {meant}?" if meant else ""


def device_rule(given: Any) -> str:
    """Return what a device may be called, and what to take in the place of the one given."""
    word = str(given).strip().lower().partition(":")[0]
    if word in DEVICES_ELSEWHERE:
        return f"must be auto, cpu, cuda or cuda:N; {word} is not supported, use cpu"
    return "must be auto, cpu, cuda or cuda:N"


def literal_choices(message: str) -> tuple[str, ...]:
    """Return the words in quotes that a message of pydantic lists."""
    return tuple(message.split("'")[1::2])


def _nearest(word: str, choices: tuple[str, ...]) -> str | None:
    lower = {choice.lower(): choice for choice in choices}
    word = word.strip().lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(word, lower, n=1, cutoff=0.75)
    return lower[near[0]] if near else None


def _choice_anywhere(section: str, given: str) -> str | None:
    """Return the setting of a section that has the word among its choices, as ``key=value``."""
    for model in models_of(Config.model_fields[section].annotation):
        for name, field in model.model_fields.items():
            for part in (field.annotation, *get_args(field.annotation)):
                if get_origin(part) is Literal and (choice := _nearest(given, tuple(map(str, get_args(part))))):
                    return f"{section}.{name}={choice}"
    return None


def _first_setting(section: str, data_names: Mapping[str, Any]) -> str:
    if section == "data":
        return f"data.name={next(iter(data_names))}"
    model = next(models_of(Config.model_fields[section].annotation))
    name, field = next(iter(model.model_fields.items()))
    return f"{section}.{name}={_default(field)}"


def _default(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True) if not field.is_required() else "VALUE"
    return default if isinstance(default, str | int | float) else "VALUE"
