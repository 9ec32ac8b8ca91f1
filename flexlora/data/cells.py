"""Reads single values of other people's data: what counts as missing, texts, and names of owners and labels."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from flexlora.data.found_values import abridged, column_list
from flexlora.data.instruction_errors import InstructionDataError

Fields = Mapping[str, object]


def is_missing(value: object) -> bool:
    """Return whether a value says nothing: None, not-a-number, a text of white space, a list or object of such."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return all(map(is_missing, value.values()))
    if isinstance(value, Sequence):
        return all(map(is_missing, value))
    # NA and NaT are what pandas writes where nothing is.
    return (
        value is None or (isinstance(value, Real) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    )


def text_of(fields: Fields, name: str, place: str, *, optional: bool = False) -> str:
    """Return a text as it stands in the data, empty if it is missing or nothing but white space.

    Args:
        fields: The columns of a row, or what a turn of a conversation holds.
        name: Of the column.
        place: File and line of the row, for error messages.
        optional: Whether the column may be missing.

    Raises:
        InstructionDataError: The column is missing or holds something else.
    """
    if name not in fields and not optional:
        raise InstructionDataError(f"{place}: there is no {name!r}; found {column_list(fields)}")
    value = fields.get(name)
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise InstructionDataError(f"{place}: {name!r} must be a text; got {abridged(value)}")
    return value


def answers_of(fields: Fields, name: str, place: str) -> tuple[str, ...]:
    """Return the accepted answers that are not empty, as they stand; a list in the data is several of them.

    Raises:
        InstructionDataError: The column is missing or holds something else.
    """
    value = fields.get(name)
    if not isinstance(value, list | tuple):
        text = text_of(fields, name, place)
        return (text,) if text else ()
    texts = [text for text in value if not is_missing(text)]
    if not all(isinstance(text, str) for text in texts):
        raise InstructionDataError(f"{place}: {name!r} must be a text or a list of texts; got {abridged(value)}")
    return tuple(dict.fromkeys(str(text) for text in texts))


def name_of(value: object, field: str, place: str) -> str:
    """Return an owner or a label as text, empty if it is missing; 3.0, as tables write 3, becomes ``3``.

    Raises:
        InstructionDataError: It is neither a text nor a number.
    """
    if is_missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise InstructionDataError(f"{place}: {field!r} must be a text or a whole number; got {abridged(value)}")
    if isinstance(value, str | Integral):
        return str(value)
    return str(int(float(value))) if value == value // 1 else str(value)
