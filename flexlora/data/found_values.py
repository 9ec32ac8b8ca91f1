"""Shows values of other people's data in error messages."""

from collections.abc import Iterable

_MOST_CHARACTERS = 60


def abridged(value: object) -> str:
    """Return a value as Python writes it, cut to 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= _MOST_CHARACTERS else shown[: _MOST_CHARACTERS - 3] + "..."


def column_list(columns: Iterable[object]) -> str:
    """Return the names of columns behind the words ``the columns``, or ``no columns``."""
    names = [str(column) for column in columns]
    return f"the columns {', '.join(names)}" if names else "no columns"
