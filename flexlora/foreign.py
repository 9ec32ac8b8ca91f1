"""Reads JSON and YAML that others wrote or a disk has damaged: whatever is wrong becomes one error that says where.

Size and depth are bounded, and so are the aliases of YAML: a few hundred bytes of nested anchors can stand for more
values than a machine has memory for.
"""

import json
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from flexlora.errors import FlexLoraError
from flexlora.text import printable

DEEPEST = 100
"""Most lists and mappings inside one another."""
MOST_YAML_BYTES = 10_000_000
MOST_INTEGER_BITS = 1023
"""Of a whole number in YAML; larger ones are no floats, and Python refuses to write very large ones."""
ALIASES_PER_NODE = 10
"""Times that the aliases of a YAML text may multiply it on average."""
FREE_NODES = 1000
"""Values that aliases may add to any text."""
LONGEST_REASON = 300

TOO_DEEP = f"values may be nested {DEEPEST} deep, not deeper"
INVALID_JSON = "not valid JSON: "


class ForeignError(FlexLoraError, ValueError):
    """A text is not what its format asks for.

    Attributes:
        reason: What is wrong, without the place and the rule.
    """

    def __init__(self, place: object, reason: str, rule: str = "") -> None:
        self.reason = printable(" ".join(reason.split()))[:LONGEST_REASON]
        super().__init__(f"{place}: {rule}{self.reason}")


def read_json(content: bytes | str, place: object, unique_keys: bool = False) -> Any:
    """Return the value in a JSON text.

    Args:
        content: Bytes are UTF-8, with or without a mark at their start.
        place: What the error names: a file, or a file and a line.
        unique_keys: Refuse an object with two values under one key, of which the last would count.

    Raises:
        ForeignError: Whatever is wrong with it.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_without_repeats if unique_keys else None)
    except RecursionError:
        raise ForeignError(place, TOO_DEEP, INVALID_JSON) from None
    except (ValueError, OverflowError) as error:
        raise ForeignError(place, str(error), INVALID_JSON) from None
    if _is_deep(value):
        raise ForeignError(place, TOO_DEEP, INVALID_JSON)
    return value


def read_yaml(content: bytes | str, place: object) -> Any:
    """Return the value in a YAML text, None for an empty one; only plain values, as with ``yaml.safe_load``.

    Args:
        content: Bytes are UTF-8.
        place: What the error names.

    Raises:
        ForeignError: Whatever is wrong with it.
    """
    if len(content) > MOST_YAML_BYTES:
        raise ForeignError(place, f"must have at most {MOST_YAML_BYTES:,} bytes; got {len(content):,}")
    try:
        loader = _Loader(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_aliases(node, place)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ForeignError(place, f"not valid YAML: {TOO_DEEP}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise ForeignError(place, f"not valid YAML{where}: {why}") from None
    except yaml.reader.ReaderError as error:
        # For all that its stub says, the character is a number where a text was read.
        code = ord(error.character) if isinstance(error.character, str) else int(error.character)
        raise ForeignError(
            place, f"not valid YAML: character {error.position} is U+{code:04X}, {error.reason}"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ForeignError(place, f"not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """A loader that knows where a value is that cannot be made, such as a date in month 13."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > MOST_INTEGER_BITS:
                raise OverflowError(f"whole numbers have at most {MOST_INTEGER_BITS} bits")
            return value
        except (yaml.YAMLError, RecursionError):
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None, None, f"{node.value!r:.60} is no {kind} ({type(error).__name__}: {error})", node.start_mark
            ) from None


def _check_aliases(root: yaml.Node, place: object) -> None:
    """Raise if the text is too deep, or stands for far more values than it has."""
    known: dict[int, tuple[int, int] | None] = {}
    size, depth = _size_and_depth(root, known, place)
    most = ALIASES_PER_NODE * len(known) + FREE_NODES
    if size > most:
        raise ForeignError(
            place, f"its aliases (*name) stand for {size:.3g} values, and {most} are the most for a text of its length"
        )
    if depth > DEEPEST:
        raise ForeignError(place, f"values may be nested {DEEPEST} deep; got {depth}")


def _size_and_depth(node: yaml.Node, known: dict[int, tuple[int, int] | None], place: object) -> tuple[int, int]:
    """Return how many values a node stands for and how deep they are; ``known`` is filled with those of all below."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ForeignError(place, f"line {node.start_mark.line + 1}: an anchor (&name) must not hold its own alias")
        return found
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node, place)
        parts = [part for pair in node.value for part in pair]
    elif any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise ForeignError(place, f"line {node.start_mark.line + 1}: half of a surrogate pair is no text")
    measured = [_size_and_depth(part, known, place) for part in parts]
    size, depth = 1 + sum(size for size, _ in measured), 1 + max((depth for _, depth in measured), default=0)
    known[id(node)] = size, depth
    return size, depth


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _check_keys(node: yaml.MappingNode, place: object) -> None:
    """Raise if a mapping has a key twice, of which YAML would take the last without a word."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ForeignError(place, f"{key.value!r:.60} is there twice, in lines {seen[key.value]} and {line}")
            seen[key.value] = line


def _is_deep(value: Any) -> bool:
    """Return whether lists and mappings are nested deeper than ``DEEPEST``."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for whole in level
            if isinstance(whole, list | dict)
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, list | dict)
        ]
        if not level:
            return False
    return True
