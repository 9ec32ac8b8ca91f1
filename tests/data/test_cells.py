"""What counts as missing, and what names owners and labels."""

import pytest

from flexlora.data.cells import answers_of, is_missing, name_of
from flexlora.data.instruction_errors import InstructionDataError


def test_missing_is_whatever_says_nothing():
    pandas = pytest.importorskip("pandas")
    nothing = [None, "", " \n", float("nan"), [], {}, pandas.NA, pandas.NaT, pandas.Series([None], dtype=float)[0]]
    # What a list or an object holds decides, too: datasets fills the fields of objects with None.
    nothing += [[None], [""], (" ", None), {"name": None, "arguments": ""}, [{"role": None, "content": None}]]
    assert all(map(is_missing, nothing))
    assert not any(map(is_missing, [0, False, 0.0, "0", [0], [None, "a"], {"a": False}, "None"]))


def test_names_are_texts_whole_numbers_and_what_tables_make_of_them():
    pandas = pytest.importorskip("pandas")
    # A column of whole numbers with a gap is one of floats.
    with_gap = pandas.Series([3, None])
    assert [name_of(value, "owner", "row") for value in ("ward 3", 3, with_gap[0], with_gap[1], 0, 2.5)] == [
        *("ward 3", "3", "3", "", "0", "2.5")
    ]
    for value in (True, ["a"], {"a": 1}):
        with pytest.raises(InstructionDataError, match="row: 'owner' must be a text or a whole number; got"):
            name_of(value, "owner", "row")


def test_answers_that_say_nothing_are_none_in_a_list_and_alone():
    for value in ("", None, [], [""], [None], [None, " "]):
        assert answers_of({"output": value}, "output", "row") == ()
    assert answers_of({"output": [None, "a", "", "a", "b"]}, "output", "row") == ("a", "b")
    with pytest.raises(InstructionDataError, match="row: 'output' must be a text or a list of texts; got"):
        answers_of({"output": ["a", 1]}, "output", "row")
