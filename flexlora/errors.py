"""Defines the base of every error that flexlora raises on purpose."""

from flexlora.text import printable


class FlexLoraError(Exception):
    """Base of every error raised on purpose; its message names the rule, the value and the fix."""

    def __str__(self) -> str:
        """Return the message, control characters of the names in it escaped."""
        return printable(super().__str__(), keep_lines=True)
