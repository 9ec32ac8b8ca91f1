"""Replaces halves of surrogate pairs, which JSON and Python accept in a text and no tokenizer does."""

from collections.abc import Mapping
from typing import Any


def is_whole(text: str) -> bool:
    """Return whether a text can be written as UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_text(text: str) -> str:
    """Return the text with the two halves of a pair joined and U+FFFD in place of single halves."""
    return text if is_whole(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def whole_value(value: Any) -> Any:
    """Return plain data with every text in it whole; the very same object where nothing had to be replaced."""
    if isinstance(value, str):
        return whole_text(value)
    if isinstance(value, Mapping):
        pairs = [(whole_value(key), whole_value(own)) for key, own in value.items()]
        changed = any(new is not key or own is not value[key] for (new, own), key in zip(pairs, value, strict=True))
        return dict(pairs) if changed else value
    if isinstance(value, list | tuple):
        parts = [whole_value(own) for own in value]
        changed = any(new is not own for new, own in zip(parts, value, strict=True))
        return type(value)(parts) if changed and type(value) in (list, tuple) else value
    return value
