"""The tools of a row stand in one of two columns."""

import json

import pytest

from flexlora.data.data_notes import DataNotes
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_schemas import RowReader
from flexlora.data.tools import tools_of

FUNCTION = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"functions": [FUNCTION]},
        {"functions": json.dumps([FUNCTION]), "tools": None},
        {"functions": [json.dumps(FUNCTION)], "tools": "[]"},
        {"functions": [FUNCTION], "tools": [TOOL]},
    ],
)
def test_functions_are_tools_as_openai_writes_them_today(fields):
    # https://platform.openai.com/docs/api-reference/chat/create: tools replace functions, each {type, function}.
    assert json.loads(tools_of(fields, "line 1")) == [TOOL]


def test_functions_beside_turns_that_call_them_reach_the_example_and_are_not_noted_as_unused():
    call = {"name": "add", "arguments": '{"x": 1}'}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "function_call": call}]
    notes = DataNotes()
    (example,) = RowReader(notes, {}).examples({"messages": turns, "functions": [FUNCTION]}, "line 1")
    assert json.loads(example.tools) == [TOOL]
    assert not notes.unused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"functions": 7}, "line 1: 'functions' must be a list of tools; got 7"),
        ({"functions": [FUNCTION], "tools": [{"type": "function"}]}, "'tools' and 'functions' contradict each other"),
    ],
)
def test_tools_that_are_none_or_differ_are_refused(fields, message):
    with pytest.raises(InstructionDataError, match=message):
        tools_of(fields, "line 1")
