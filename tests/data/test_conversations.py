"""Conversations of every common writer become examples; what a turn says about itself is honoured or refused."""

import json

import pytest

from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_schemas import RowReader

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}


def read(row, notes=None, **options):
    return list(RowReader(notes or DataNotes(), {}, **options).examples(row, "line 1"))


def test_an_answer_of_weight_zero_is_context_and_not_trained():
    # https://platform.openai.com/docs/guides/fine-tuning: "a weight key (0 or 1)" on assistant messages.
    turns = [QUESTION, {**ANSWER, "weight": 0}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    assert read({"messages": turns}) == [Example("r", "", ("b",), history=(("user", "q"), ("assistant", "a")))]


@pytest.mark.parametrize("field", ["weight", "train", "training", "trainable", "loss"])
@pytest.mark.parametrize(("value", "num"), [(0, 0), (0.0, 0), (False, 0), (1, 1), (True, 1), (None, 1)])
def test_every_name_of_a_weight_is_honoured(field, value, num):
    assert len(read({"messages": [QUESTION, {**ANSWER, field: value}]})) == num


@pytest.mark.parametrize(
    ("turn", "options", "message"),
    [
        ({**ANSWER, "weight": 0.5}, {}, "line 1, turn 2: 'weight' must be 0 or 1; got 0.5"),
        ({**ANSWER, "train": "no"}, {}, "turn 2: 'train' must be 0 or 1; got 'no'"),
        ({**ANSWER, "weight": 0}, {"trains_all": True}, "'weight' is 0, but data.loss_on=all trains every turn"),
        ({**QUESTION, "weight": 1}, {}, "'weight' is 1 on a turn of user, and only the assistant's are trained"),
        ({**ANSWER, "reasoning_content": "hm"}, {}, "turn 2: the field 'reasoning_content' cannot be trained; put it"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, {}, "one of its parts is .*image_url"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, {}, "a tool call must be an object with"),
        ({**QUESTION, "tool_calls": [CALL]}, {}, "only the assistant may have 'tool_calls'"),
        ({"from": "human", "value": 7}, {}, "turn 2: 'value' must be a text; got 7"),
        ({**QUESTION, "content": {"t": 1}}, {}, "'content' must be a text or a list of texts; one of its parts is"),
        ({**QUESTION, "content": [{"type": "text", "text": None, "url": "x"}]}, {}, "one of its parts is .*url"),
        ({**QUESTION, "content": [{"type": "image", "text": None}]}, {}, "one of its parts is .*image"),
        ({**ANSWER, "mask": True}, {}, "turn 2: the field 'mask' may mean either; say weight"),
        (
            {**ANSWER, "weight": 1, "train": False},
            {},
            "turn 2: 'weight' and 'train' contradict each other: 1 and False",
        ),
        ({**ANSWER, "weight": 1, "loss": False}, {}, "turn 2: 'weight' and 'loss' contradict each other"),
        ({**ANSWER, "weight": 0, "train": True}, {}, "turn 2: 'weight' and 'train' contradict each other"),
        (
            {**ANSWER, "content": "c", "value": "d"},
            {},
            "turn 2: 'content' and 'value' contradict each other: 'c' and 'd'",
        ),
        ({**QUESTION, "from": "gpt"}, {}, "turn 2: 'role' and 'from' contradict each other: 'user' and 'gpt'"),
        ({**QUESTION, "from": "ghost"}, {}, "turn 2: from must be system, user, assistant or tool"),
        ({"from": "function_call", "value": None}, {}, "a turn of function_call must hold a call; got nothing"),
        (
            {**ANSWER, "tool_calls": [CALL], "function_call": {"name": "sub", "arguments": "{}"}},
            {},
            "'tool_calls' and 'function_call' contradict each other",
        ),
    ],
)
def test_what_would_be_lost_is_refused_by_turn_and_field(turn, options, message):
    with pytest.raises(InstructionDataError, match=message):
        read({"messages": [QUESTION, turn]}, **options)


def test_sharegpt_is_read_as_the_same_conversation_of_openai():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    openai = [{"role": role, "content": content} for role, content in turns]
    sharegpt = [{"from": names[role], "value": content} for role, content in turns]
    assert read({"conversations": sharegpt}) == read({"messages": openai}) != []
    assert read({"conversations": json.dumps(sharegpt)}) == read({"messages": openai})
    # What LLaMA-Factory's variant has in a column of its own.
    assert read({"conversations": sharegpt[1:], "system": "s"}) == read({"messages": openai})
    # Said twice is said once, and an empty turn says nothing.
    assert read({"conversations": sharegpt, "system": "s"}) == read({"messages": openai})
    empty = [{**openai[0], "content": ""}, *openai[1:]]
    assert read({"messages": empty, "system": "s"}) == read({"messages": openai})
    with pytest.raises(InstructionDataError, match="both a column and the first turn say what the system says"):
        read({"conversations": sharegpt, "system": "t"})


def test_developers_speak_as_the_system_and_text_parts_are_joined():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]
    turns = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}, ANSWER]
    assert read({"messages": turns}) == [Example("q?", "", ("a",), history=(("system", "s"),))]


def test_tool_calls_and_their_results_are_turns_like_others():
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call00001", "content": "2"}
    tools = [{"type": "function", "function": {"name": "add"}}]
    called, answered = read({"messages": [QUESTION, call, result, ANSWER], "tools": tools})
    assert called.outputs == ('[{"name": "add", "arguments": {"x": 1}}]',)
    assert json.loads(called.answer_fields)["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert (answered.instruction, answered.outputs) == ("", ("a",))
    assert [turn[0] for turn in answered.history] == ["user", "assistant", "tool"]
    assert json.loads(answered.history[2][2]) == {"tool_call_id": "call00001"}
    assert json.loads(called.tools) == tools == json.loads(answered.tools)
    # Earlier words for the same.
    old = [QUESTION, {"role": "assistant", "function_call": CALL["function"]}, {"role": "function", "content": "2"}]
    assert len(read({"messages": [*old, ANSWER]})) == 2
    sharegpt = [("human", "q"), ("function_call", json.dumps(CALL["function"])), ("observation", "2"), ("gpt", "a")]
    turns = [{"from": role, "value": content} for role, content in sharegpt]
    assert [example.outputs for example in read({"conversations": turns})] == [called.outputs, ("a",)]


def test_prompt_and_completion_may_be_conversations_of_which_the_completion_is_trained():
    # The conversational form of TRL's prompt-completion data sets.
    expected = [Example("r", "", ("b",), history=(("user", "q"), ("assistant", "a")))]
    prompt, completion = [QUESTION, ANSWER, {"role": "user", "content": "r"}], [{"role": "assistant", "content": "b"}]
    assert read({"prompt": prompt, "completion": completion}) == expected
    assert read({"prompt": prompt, "completion": "b"}) == expected
    assert read({"prompt": "q", "completion": [ANSWER]}) == [Example("q", "", ("a",))]


def test_answers_before_the_first_question_are_counted_and_fields_that_are_not_used_named():
    notes = DataNotes()
    greeting = {"role": "assistant", "content": "Hello", "timestamp": 7}
    (example,) = read({"messages": [greeting, QUESTION, ANSWER], "source": "web"}, notes)
    assert example.history == (("assistant", "Hello"),)
    assert notes.num_unasked == 1
    assert set(notes.unused) == {"timestamp (of turns)", "source"}
    assert "Not used: source, timestamp (of turns)." in notes.sentences()


def test_the_field_of_a_turn_that_holds_something_is_taken_whatever_stands_empty_beside_it():
    empty = {"role": None, "content": None, "from": None, "value": None, "tool_calls": None, "function_call": None}
    openai = [QUESTION, ANSWER]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    expected = [Example("q", "", ("a",))]
    for nothing in (None, "", " ", [], [None], {"name": None, "arguments": None}):
        fields = dict.fromkeys(empty, nothing)
        assert read({"messages": [{**fields, **turn} for turn in openai]}) == expected
        assert read({"conversations": [{**fields, **turn} for turn in sharegpt]}) == expected
    unsaid = [{"type": "text", "text": None}]
    assert read({"messages": [{"role": "user", "content": unsaid, "value": "q"}, ANSWER]}) == expected
    # Both filled, and they mean the same.
    both = [{**mine, **theirs} for mine, theirs in zip(openai, sharegpt, strict=True)]
    assert read({"messages": both}) == expected
    parts = [{**QUESTION, "content": [{"type": "text", "text": "q"}], "value": "q"}, ANSWER]
    assert read({"messages": parts}) == expected


def test_rows_whose_objects_datasets_unified_are_all_read():
    datasets = pytest.importorskip("datasets")
    openai = {"conversations": [QUESTION, ANSWER]}
    sharegpt = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    feature = [{name: datasets.Value("string") for name in ("role", "content", "from", "value")}]
    rows = datasets.Dataset.from_list([openai, sharegpt], features=datasets.Features(conversations=feature))
    assert rows[1]["conversations"][0]["content"] is None
    assert [read(row) for row in rows] == [[Example("q", "", ("a",))]] * 2


def test_flags_that_agree_are_one_flag():
    assert read({"messages": [QUESTION, {**ANSWER, "weight": 0, "train": False, "loss": None}]}) == []
    assert len(read({"messages": [QUESTION, {**ANSWER, "weight": 1, "train": True}]})) == 1


def test_a_call_that_two_fields_hold_is_one_call():
    call = {"role": "assistant", "from": "function_call", "content": None, "value": json.dumps(CALL["function"])}
    once = read({"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}]})
    (twice,) = read({"messages": [QUESTION, {**call, "tool_calls": [CALL], "function_call": CALL["function"]}]})
    assert [twice] == once


def test_an_answer_to_an_empty_question_is_counted():
    notes = DataNotes()
    assert len(read({"messages": [QUESTION, ANSWER, {"role": "user", "content": None}, ANSWER]}, notes)) == 1
    assert notes.num_unasked == 1


def test_a_column_of_the_system_and_a_prompt_of_turns_agree_or_are_refused():
    prompt = [{"role": "system", "content": "s"}, QUESTION]
    expected = [Example("q", "", ("a",), history=(("system", "s"),))]
    assert read({"prompt": prompt, "completion": [ANSWER], "system": "s"}) == expected
    assert read({"prompt": prompt[1:], "completion": "a", "system": "s"}) == expected
    with pytest.raises(InstructionDataError, match=r"both a column and the first turn .* not the same: 't' and 's'"):
        read({"prompt": prompt, "completion": "a", "system": "t"})
    # A history follows what the system says.
    (example,) = read({"prompt": prompt, "completion": "a", "history": [["p", "b"]]})
    assert example.history == (("system", "s"), ("user", "p"), ("assistant", "b"))


def test_an_empty_list_that_a_table_writes_as_text_is_empty():
    row = {"messages": "[]", "history": "[ ]", "tools": "null", "instruction": "q", "output": "a"}
    assert read(row) == [Example("q", "", ("a",))]
    assert read({"messages": "[]", "system": "s"}) == []
