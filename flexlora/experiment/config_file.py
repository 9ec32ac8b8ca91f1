"""Reads and writes configurations, a YAML file plus ``key=value`` overrides, and explains what is wrong."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from flexlora.errors import FlexLoraError
from flexlora.experiment.config import Config, ConfigError
from flexlora.experiment.config_checks import disagreements, missing_paths
from flexlora.experiment.config_clients import RankConfig
from flexlora.experiment.config_counts import excessive
from flexlora.experiment.config_data import (
    GeneratedData,
    InMemoryData,
    InstructionsData,
    NaturalInstructionsData,
    PhoneBookData,
)
from flexlora.experiment.config_path import DEMO, content_of
from flexlora.experiment.config_section import Section
from flexlora.experiment.method_config import method_model, method_named
from flexlora.experiment.setting_examples import device_rule, literal_choices, meant_value, section_rule
from flexlora.experiment.setting_hints import hint
from flexlora.foreign import ForeignError, read_yaml

TRUNCATED_VALUE_LENGTH = 80

LONGEST_KEY = 200


MOST_CHECKS = 6


DEVICE = "model.device"


SECTION_ERRORS = ("model_type", "model_attributes_type")
"""What pydantic says of a single value in the place of a section."""

MOST_EXPLAINED = 100
"""Problems with an explanation; it takes a while to guess which setting an unknown key meant."""


PLACEHOLDER = "?"


DEMO_FILE = Path(__file__).with_name("demo.yaml")


DATA_SECTIONS: Mapping[str, type[Section]] = {
    "generated": GeneratedData,
    "natural_instructions": NaturalInstructionsData,
    "instructions": InstructionsData,
    "in_memory": InMemoryData,
    "phone_book": PhoneBookData,
}


def load_config(path: Path | str, overrides: Sequence[str] = (), *, check_paths: bool = False) -> Config:
    """Return the configuration in the YAML file ``path`` with ``key.sub=value`` overrides applied.

    Args:
        path: The YAML file.
        overrides: Such as ``rounds.num_rounds=3``; values are YAML.
        check_paths: Also report data and model folders that do not exist.

    Raises:
        ConfigError: With every problem found, each naming key, value and rule.
    """
    return override_config(read_settings(path), str(path), overrides, check_paths=check_paths)


def override_config(
    tree: Mapping[str, Any], source: str, overrides: Sequence[str] = (), *, check_paths: bool = False
) -> Config:
    """Return the configuration in a plain tree with overrides applied; see ``load_config``."""
    tree = copy.deepcopy(dict(tree))
    problems = [problem for override in overrides if (problem := _apply_override(tree, override))]
    source = source if not overrides else f"{source} with {len(overrides)} override(s)"
    return parse_config(tree, source, problems, check_paths=check_paths)


def settings_file(path: Path | str) -> Path:
    """Return the file that a path names: that of the package for ``demo``, unless there is a file of this name."""
    path = Path(path)
    return DEMO_FILE if str(path) == DEMO and not path.is_file() else path


def read_settings(path: Path | str) -> dict[str, Any]:
    """Return the settings in a YAML file as they are written, unchecked.

    Raises:
        ConfigError: If there is no such file, it is a folder, or it holds no mapping.
    """
    path = settings_file(path)
    try:
        tree = read_yaml(content_of(path), path) or {}
    except ForeignError as error:
        raise ConfigError([error.reason], str(path)) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"must hold a mapping of sections; got {type(tree).__name__}"], str(path))
    return tree


def parse_config(
    tree: Mapping[str, Any], source: str, problems: Sequence[str] = (), *, check_paths: bool = False
) -> Config:
    """Return the configuration in a plain tree, as read from YAML.

    Raises:
        ConfigError: With every problem found and those already known.
    """
    found = dict.fromkeys(problems)
    pruned = copy.deepcopy(dict(tree))
    config = None
    # Settings that fail alone would hide those that disagree, so wrong ones are set aside and the rest checked again.
    for _ in range(MOST_CHECKS):
        try:
            config = Config.model_validate(pruned)
            break
        except ValidationError as error:
            for detail in _joined(list(_details(error))):
                # A file of another kind has thousands of unknown keys, of which no message can name all.
                reader = _explain if len(found) < MOST_EXPLAINED else _counted
                found |= dict.fromkeys(reader(detail, pruned))
                _set_aside(pruned, detail)
    if config is not None:
        found |= dict.fromkeys(excessive(config))
        found |= dict.fromkeys(disagreements(config))
    if config is not None and check_paths:
        found |= dict.fromkeys(problem for problem in missing_paths(config) if PLACEHOLDER not in problem)
    if found or config is None:
        raise ConfigError(list(found) or ["no valid setting could be read"], source)
    return config


def _details(error: ValidationError) -> Iterator[dict[str, Any]]:
    """Yield the errors, those within the section of a method with their whole location."""
    for detail in error.errors(include_url=False):
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError):
            yield from ({**own, "loc": (*detail["loc"], *own["loc"])} for own in _details(inner))
        else:
            yield dict(detail)


def _joined(details: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the errors; of a setting that may be a word or a mapping, one error with both."""
    shapes = {"dict_type": "a mapping", "tuple_type": "a list"}
    by_key = {(*_written_location(one["loc"]), one["type"]): one for one in details}
    for detail in details:
        key = tuple(_written_location(detail["loc"]))
        other = next((by_key[*key, shape] for shape in shapes if (*key, shape) in by_key), None)
        if detail["type"] in shapes and (*key, "literal_error") in by_key:
            continue
        yield {**detail, "other_shape": other} if detail["type"] == "literal_error" and other else detail


def _written_location(location: Sequence[Any]) -> list[str]:
    """Return the key as a person wrote it, without the variants that pydantic adds to the path."""
    return [
        str(part)
        for index, part in enumerate(location)
        if not (index == 1 and part in DATA_SECTIONS) and not str(part).startswith(("literal[", "dict[", "tuple["))
    ]


def _set_aside(tree: dict[str, Any], detail: Any) -> None:
    location = _written_location(detail["loc"])
    node: Any = tree
    for part in location[:-1]:
        if not isinstance(node, dict) or part not in node:
            return
        node = node[part]
    if not location or not isinstance(node, dict):
        return
    if detail["type"] == "missing" or detail["input"] is None:
        node[location[-1]] = PLACEHOLDER
    else:
        node.pop(location[-1], None)


def dump_config(config: Config) -> str:
    """Return the configuration as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> str | None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        return f"override {_shown(override)} must look like key.sub=value"
    try:
        value = read_yaml(text, key)
    except ForeignError as error:
        return f"override {_shown(override)}: the value is {error.reason}"
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            return f"override {_shown(override)}: {parent} is {_shown(child)}, not a section"
        node = child
    # YAML reads 1e-3 as text; numbers written so are meant as numbers.
    node[last] = _number(value) if isinstance(value, str) else value
    return None


def _number(text: str) -> float | str:
    # Hub revisions are all digits or look like 12e4567; what people mean as a number has a short exponent.
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}", text) else text


def _counted(detail: Any, tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem without an explanation, as one of many."""
    if detail["input"] != PLACEHOLDER:
        yield f"{_key(_written_location(detail['loc']))}: {detail['msg']}"


def _key(location: Sequence[str]) -> str:
    """Return a key as messages name it."""
    key = ".".join(location)
    return key if len(key) <= LONGEST_KEY else f"{key[:LONGEST_KEY]}..."


def _shown(value: object) -> str:
    """Return a value as messages show it, whatever its length."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= TRUNCATED_VALUE_LENGTH else text[:TRUNCATED_VALUE_LENGTH] + "..."


def _explain(detail: Any, tree: Mapping[str, Any]) -> Iterator[str]:
    location = [str(part) for part in detail["loc"]]
    shown = _written_location(location)
    if detail["input"] == PLACEHOLDER:
        return
    if isinstance(detail["input"], dict) and any(part.startswith("literal[") for part in location):
        return  # The other reading of the setting, as a mapping, is explained by its own entry.
    key, error = _key(shown), detail.get("ctx", {}).get("error")
    if isinstance(error, FlexLoraError):
        yield str(error)
    elif detail["type"] == "extra_forbidden":
        yield f"{key}: there is no such setting; {hint(shown, _known_keys(location, tree), _name_of(location, tree))}"
    elif detail["type"] == "invalid_key":
        names = ", ".join(shown[:-1])
        yield f"{names + ': ' if names else ''}names of settings must be text; got {_as_yaml(detail['input'])}"
    elif detail["type"] == "missing" or (detail["input"] is None and detail["type"] not in SECTION_ERRORS):
        yield f"{key}: must be set, for example {key}=VALUE on the command line"
    elif detail["type"] in ("union_tag_not_found", "union_tag_invalid"):
        given = detail["input"].get("name") if isinstance(detail["input"], dict) else detail["input"]
        meant = meant_value(f"{key}.name", given, tuple(DATA_SECTIONS))
        yield f"{key}.name: must be one of {', '.join(DATA_SECTIONS)}; got {_shown(given)}{meant}"
    else:
        meant = meant_value(key, detail["input"], _choices(key, detail))
        yield f"{key}: {_rule(key, detail, tree)}; got {_shown(detail['input'])}{meant}"


def _rule(key: str, detail: Any, tree: Mapping[str, Any]) -> str:
    """Return what a value must be, with an example made of the one given where its shape is wrong."""
    given = detail["input"] if isinstance(detail["input"], str | int | float) else "VALUE"
    given = given if len(_shown(given)) < TRUNCATED_VALUE_LENGTH else "VALUE"
    if detail["type"] == "tuple_type":
        return f"must be a list, as {key}=[{given}]"
    if detail["type"] == "dict_type":
        return f"must be a mapping, as {key}={{NAME: VALUE}}"
    if detail["type"] in SECTION_ERRORS:
        if key in Config.model_fields:
            return section_rule(key, detail["input"], DATA_SECTIONS)
        first = next(iter(_known_keys([*key.split("."), ""], tree)), "NAME")
        return f"must be a section of settings, as {key}.{first}={given}"
    if key == DEVICE:
        return device_rule(detail["input"])
    if other := detail.get("other_shape"):
        return f"{detail['msg']}, or {_rule(key, other, tree).removeprefix('must be ')}"
    return detail["msg"]


def _name_of(location: Sequence[str], tree: Mapping[str, Any]) -> str:
    """Return the name of the data or the method that a key is among, empty in other sections."""
    if location[0] == "method" and len(location) > 1:
        return method_named(tree["method"])[0]
    return location[1] if len(location) > 1 and location[1] in DATA_SECTIONS else ""


def _choices(key: str, detail: Any) -> tuple[str, ...]:
    if key == DEVICE:
        return ("auto", "cpu", "cuda")
    return literal_choices(detail["msg"]) if detail["type"] == "literal_error" else ()


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value).splitlines()[0]


def _known_keys(location: Sequence[str], tree: Mapping[str, Any]) -> list[str]:
    if len(location) == 1:
        return list(Config.model_fields)
    if location[0] == "method":
        return list(method_model(*method_named(tree["method"])).model_fields)
    if location[1] in DATA_SECTIONS:
        return list(DATA_SECTIONS[location[1]].model_fields)
    if location[0] == "clients" and len(location) > 3:
        return list(RankConfig.model_fields)
    annotation = Config.model_fields[location[0]].annotation
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]  # `ray` may be null.
    return [name for kind in kinds if issubclass(kind, BaseModel) for name in kind.model_fields]
