"""Reads the tools that a conversation may call, from ``tools`` or, as OpenAI called it earlier, ``functions``."""

import json
from collections.abc import Mapping

from flexlora.data.cells import Fields, is_missing
from flexlora.data.conversations import check_equal, listed, parsed_json
from flexlora.data.found_values import abridged
from flexlora.data.instruction_errors import InstructionDataError

TOOLS = ("tools", "functions")


def tools_of(fields: Fields, place: str) -> str:
    """Return the tools of a row as the JSON of a list, empty for none.

    Args:
        fields: The columns of the row.
        place: File and line of the row, for error messages.

    Raises:
        InstructionDataError: A column holds no list, or the two hold different tools.
    """
    found: dict[str, list[object]] = {}
    for name in TOOLS:
        value = fields.get(name)
        if is_missing(value):
            continue
        tools = listed(value, place)
        if tools is None:
            raise InstructionDataError(f"{place}: {name!r} must be a list of tools; got {abridged(value)}")
        parsed = [parsed_json(tool, place) if isinstance(tool, str) else tool for tool in tools]
        if parsed:
            found[name] = [_as_tool(tool) for tool in parsed] if name == "functions" else parsed
    check_equal(found, fields, place)
    tools = next(iter(found.values()), [])
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def _as_tool(function: object) -> object:
    """Return a function as chat templates take tools, if it is not one of these already."""
    is_tool = not isinstance(function, Mapping) or "function" in function
    return function if is_tool else {"type": "function", "function": function}
