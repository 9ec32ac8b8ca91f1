"""Rows in a file: which share a prompt, what is counted, and what identifies a prompt."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.examples import Example
from flexlora.data.rows import Row, StoredRows, prompt_hash


def row(prompt, answer, client="", label=""):
    return Row((Example(prompt, "", (answer,)),), label, client)


def stored(content, *, within_clients=False):
    rows = StoredRows(within_clients=within_clients)
    for one in content:
        rows.add(one)
    return rows


def test_rows_with_one_prompt_are_a_group_that_accepts_all_answers_in_their_order():
    rows = stored([row("p", "a", label="first"), row("q", "b"), row("p", "c", label="second"), row("p", "a")])
    assert [rows.examples(number) for number in range(len(rows))] == [
        (Example(prompt, "", (answer,)),) for prompt, answer in (("p", "a"), ("q", "b"), ("p", "c"), ("p", "a"))
    ]
    assert rows.groups(range(4)) == [[0, 2, 3], [1]] and rows.groups([3, 1]) == [[3], [1]]
    assert rows.merged([0, 2, 3]) == (Example("p", "", ("a", "c")),)
    assert (rows.labels, rows.num_read, rows.num_repeated, rows.num_empty) == (["first", "", "second", ""], 4, 2, 0)


def test_texts_that_stand_alone_share_no_prompt():
    rows = stored([row("", "one text"), row("", "another"), row("", "one text")])
    assert rows.groups(range(3)) == [[0, 2], [1]]


def test_equal_prompts_of_two_clients_stay_apart_only_within_clients():
    content = [row("p", "a", "x"), row("p", "b", "y"), row("p", "c", "x")]
    apart = stored(content, within_clients=True)
    assert apart.clients == ["x", "y", "x"] and apart.groups(range(3)) == [[0, 2], [1]]
    assert stored(content).groups(range(3)) == [[0, 1, 2]]


def test_conversations_are_one_group_only_if_all_their_prompts_are_equal():
    first, second = Example("Hi", "", ("a",)), Example("more", "", ("b",), history=(("user", "Hi"),))
    rows = stored([Row((first,)), Row((first, second)), Row((first, second)), Row((second,))])
    assert [len(rows.prompts(number)) for number in range(len(rows))] == [1, 2, 2, 1]
    assert rows.groups(range(4)) == [[0], [1, 2], [3]]
    assert rows.prompts(1) == [prompt_hash(first), prompt_hash(second)]


def test_rows_without_examples_are_counted_and_not_kept():
    rows = stored([Row(()), row("p", "a")])
    assert (len(rows), rows.num_read, rows.num_empty, rows.num_repeated) == (1, 2, 1, 0)


prompts = st.builds(
    Example,
    st.text(st.characters(exclude_categories=()), max_size=3),
    st.text("ab'\\\ud800\udc00", max_size=3),
    st.just(("answer",)),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab", max_size=2)), max_size=2).map(tuple),
).filter(lambda example: not example.is_text_alone)


@settings(max_examples=200, deadline=None)
@given(prompts, prompts)
def test_two_examples_have_one_hash_exactly_if_their_prompts_are_equal_up_to_outer_white_space(one, other):
    def stripped(example):
        history = tuple((role, content.strip()) for role, content in example.history)
        return example.instruction.strip(), example.input.strip(), history

    assert (prompt_hash(one) == prompt_hash(other)) == (stripped(one) == stripped(other))
