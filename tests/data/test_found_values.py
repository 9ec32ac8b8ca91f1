"""Values of other people's data, as error messages show them."""

from flexlora.data.found_values import abridged, column_list


def test_long_values_are_cut_to_sixty_characters():
    assert abridged({"a": 1}) == "{'a': 1}"
    assert abridged("x" * 58) == repr("x" * 58)
    cut = abridged("x" * 59)
    assert len(cut) == 60 and cut.endswith("...")


def test_columns_are_listed_by_name():
    assert column_list({"a": 1, 7: 2}) == "the columns a, 7"
    assert column_list([]) == "no columns"
