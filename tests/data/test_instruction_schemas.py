"""Columns of rows become examples, by the schema of the first row."""

import pytest

from flexlora.data.examples import Example
from flexlora.data.instruction_files import InstructionDataError
from flexlora.data.instruction_schemas import renamed, schema_of


def read(content, columns=()):
    columns = dict(columns)
    convert = schema_of(content[0], columns, "line 1")
    places = [(f"line {number}", row) for number, row in enumerate(content, start=1)]
    return [example for place, row in places for example in convert(renamed(row, columns, place), place)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": " Do. ", "response": "Done. "}, Example("Do.", "", ("Done.",))),
        ({"instruction": "Do.", "input": "it", "output": "Done."}, Example("Do.", "it", ("Done.",))),
        ({"instruction": "Do.", "context": None, "response": "Done."}, Example("Do.", "", ("Done.",))),
        (
            {"instruction": "Do.", "input": "", "output": ["Done.", "Ready.", " "]},
            Example("Do.", "", ("Done.", "Ready.")),
        ),
        ({"prompt": "Do it.", "completion": "Done."}, Example("Do it.", "", ("Done.",))),
    ],
)
def test_every_accepted_schema_becomes_an_example(row, expected):
    assert read([row]) == [expected]


def test_a_conversation_gives_one_example_per_answer_with_what_came_before_as_history():
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Farewell")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert read([{"messages": messages}]) == [
        Example("Hi", "", ("Hello",), history=tuple(turns[:1])),
        Example("Bye", "", ("Farewell",), history=tuple(turns[:3])),
    ]


def test_messages_win_over_a_prompt_beside_them_and_renamed_columns_over_both():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = {"prompt": "P", "completion": "C", "messages": messages, "question": "Q", "reply": "R"}
    assert read([row]) == [Example("Hi", "", ("Hello",))]
    assert read([row], columns={"instruction": "question", "response": "reply"}) == [Example("Q", "", ("R",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": 7, "context": "", "response": "a"}, "line 2: 'instruction' must be a text; got 7"),
        ({"instruction": "q", "context": ""}, "line 2: there is no 'response'; found the columns instruction, context"),
        ({"instruction": "q", "context": ["c"], "response": "a"}, "line 2: 'context' must be a text"),
        ({"instruction": "q", "context": "", "response": [1]}, "line 2: 'response' must be a text or a list of texts"),
    ],
)
def test_a_broken_row_is_refused_by_its_number(row, message):
    with pytest.raises(InstructionDataError, match=message):
        read([{"instruction": "q", "context": "", "response": "a"}, row])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "line 1: messages must be a list of turns; got 'Hi'"),
        (["Hi"], "line 1, turn 1: must be an object with role and content"),
        ([{"role": "user"}], "turn 1: there is no 'content'"),
        ([{"role": "tool", "content": "x"}], "turn 1: role must be system, user or assistant; got 'tool'"),
        (
            [{"role": "user", "content": "q"}, *[{"role": "assistant", "content": "a"}] * 2],
            "turn 3: an answer of the assistant must follow a turn of the user; got one after assistant",
        ),
    ],
)
def test_a_broken_conversation_is_refused_by_its_turn(messages, message):
    with pytest.raises(InstructionDataError, match=message):
        read([{"messages": messages}])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": "response"}, "data.columns must rename to messages, prompt, .*; got answer"),
        (
            {"instruction": "query"},
            "data.columns names the column 'query', which is not there; found the columns instr",
        ),
    ],
)
def test_wrong_renames_are_refused(columns, message):
    with pytest.raises(InstructionDataError, match=message):
        read([{"instruction": "q", "response": "a"}], columns=columns)


def test_columns_that_fit_no_schema_are_refused_with_what_was_found():
    with pytest.raises(
        InstructionDataError, match=r"line 1: the columns must be messages .* found the columns a\. Rename"
    ):
        read([{"a": 1}])
    with pytest.raises(InstructionDataError, match=r"line 1: .* found no columns"):
        read([{}])
