"""Halves of surrogate pairs, which are no Unicode text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.surrogates import whole_text, whole_value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("é 😀", "é 😀"),
        # The pair that stands for one emoji (Unicode 3.9, table 3-5).
        ("\ud83d\ude00", "😀"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
    ],
)
def test_pairs_are_joined_and_halves_replaced(text, expected):
    assert whole_text(text) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=8))
def test_every_text_can_be_written_afterwards(text):
    whole = whole_text(text)
    assert whole.encode().decode() == whole
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert whole == text


def test_rows_without_halves_are_the_very_same_object():
    row = {"messages": [{"role": "user", "content": "é"}], "n": [1, None, 2.5]}
    assert whole_value(row) is row
    broken = json.loads('{"messages": [{"content": "a\\ud83d"}], "n": 1}')
    assert whole_value(broken) == {"messages": [{"content": "a\ufffd"}], "n": 1}
