"""Columns of rows become examples, by the schema whose columns hold something."""

import pytest

from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_schemas import RowReader


def read(content, columns=(), **options):
    reader = RowReader(options.pop("notes", None) or DataNotes(), dict(columns), **options)
    return [
        example for number, row in enumerate(content, start=1) for example in reader.examples(row, f"line {number}")
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": " Do. ", "response": "    return 1\n"}, Example(" Do. ", "", ("    return 1\n",))),
        ({"instruction": "Do.", "input": "it", "output": "Done."}, Example("Do.", "it", ("Done.",))),
        ({"instruction": "Do.", "context": None, "response": "Done."}, Example("Do.", "", ("Done.",))),
        (
            {"instruction": "Do.", "input": "", "output": ["Done.", "Ready.", " "]},
            Example("Do.", "", ("Done.", "Ready.")),
        ),
        ({"prompt": "Do it.", "completion": "Done."}, Example("Do it.", "", ("Done.",))),
        ({"prompt": "Do.", "context": "it", "completion": "Done."}, Example("Do.", "it", ("Done.",))),
        ({"instruction": "Do.", "response": [""], "output": "Done."}, Example("Do.", "", ("Done.",))),
        ({"instruction": "Do.", "response": [None], "output": "Done."}, Example("Do.", "", ("Done.",))),
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
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": "a", "input": "c"},
            "line 2: 'input' cannot stand beside a prompt or a completion of turns",
        ),
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
        ([{"role": "narrator", "content": "x"}], "turn 1: role must be system, user, assistant or tool, .* got 'narr"),
        (
            [{"role": "user", "content": "q"}, *[{"role": "assistant", "content": "a"}] * 2],
            "turn 3: an answer of the assistant must follow a turn of the user or of a tool; got one after assistant",
        ),
    ],
)
def test_a_broken_conversation_is_refused_by_its_turn(messages, message):
    with pytest.raises(InstructionDataError, match=message):
        read([{"messages": messages}])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": "response"}, "data.columns must rename to messages, .*prompt, .*; got answer"),
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


@pytest.mark.parametrize("nothing", ["", "  ", None, float("nan")])
@pytest.mark.parametrize(("empty", "full"), [("context", "input"), ("input", "context")])
def test_an_empty_column_does_not_hide_the_one_that_means_the_same(nothing, empty, full):
    assert read([{"instruction": "q", empty: nothing, full: "it", "output": "a"}]) == [Example("q", "it", ("a",))]
    for hidden, answer in (("response", "output"), ("output", "response")):
        assert read([{"instruction": "q", hidden: nothing, answer: "a"}]) == [Example("q", "", ("a",))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "q", "context": "c", "input": "i", "output": "a"}, "'context' and 'input' mean the same"),
        ({"instruction": "q", "response": "a", "output": "b"}, "'response' and 'output' mean the same and both hold"),
        ({"instruction": "q", "output": "a", "system": "s", "system_prompt": "t"}, "'system' and 'system_prompt' mean"),
        ({"messages": ["m"], "conversations": ["c"]}, "'messages' and 'conversations' mean the same"),
    ],
)
def test_two_columns_that_mean_the_same_and_differ_are_refused(row, message):
    with pytest.raises(InstructionDataError, match=f"line 1: {message}"):
        read([row])


def test_a_renamed_column_says_which_of_two_is_meant():
    row = {"instruction": "q", "response": "a", "output": "b", "context": "c", "input": "c"}
    assert read([row], columns={"output": "output"}) == [Example("q", "c", ("b",))]


def test_columns_of_other_schemas_that_are_empty_decide_nothing():
    # What a table of two merged data sets looks like.
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    empty = dict.fromkeys(("messages", "prompt", "completion", "instruction", "output", "text"))
    rows = [
        {**empty, "messages": turns},
        {**empty, "prompt": "q", "completion": "a"},
        {**empty, "instruction": "q", "output": "a"},
        {**empty, "instruction": "q", "output": ""},
    ]
    assert read(rows) == 3 * [Example("q", "", ("a",))]


def test_system_and_history_of_alpaca_files_come_before_the_question():
    row = {"instruction": "r", "output": "b", "system": "s", "history": [["q", "a"]]}
    expected = [Example("r", "", ("b",), history=(("system", "s"), ("user", "q"), ("assistant", "a")))]
    assert read([row]) == expected
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read([{**row, "history": turns}]) == expected
    assert read([{"prompt": "r", "completion": "b", "system_prompt": "s", "history": '[["q", "a"]]'}]) == expected
    assert read([{"instruction": "r", "output": "b", "system": None, "history": []}]) == [Example("r", "", ("b",))]
    with pytest.raises(InstructionDataError, match="line 1: 'history' must be a list of pairs of a question"):
        read([{**row, "history": ["q", "a"]}])


def test_a_text_alone_needs_the_loss_on_all_tokens():
    assert read([{"text": "Once"}], trains_all=True) == [Example("", "", ("Once",))]
    with pytest.raises(InstructionDataError, match=r"line 1: a text alone has no answer .* set data.loss_on to all"):
        read([{"text": "Once"}])
    # As in Stanford's Alpaca, where it repeats the other columns.
    row = {"instruction": "q", "output": "a", "text": "q a"}
    assert read([row], trains_all=True) == [Example("q", "", ("a",))]


def test_pictures_are_refused_and_other_columns_named():
    notes = DataNotes()
    with pytest.raises(InstructionDataError, match="line 1: the column 'images' cannot be trained"):
        read([{"prompt": "q", "completion": "a", "images": ["a.png"]}])
    read([{"prompt": "q", "completion": "a", "images": [], "split": "x", "id": None, "owner": "o"}], notes=notes)
    assert sorted(notes.unused) == ["owner", "split"]
    notes = DataNotes()
    read([{"prompt": "q", "completion": "a", "owner": "o"}], notes=notes, elsewhere=("owner",))
    assert not notes.unused
