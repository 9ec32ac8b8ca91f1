"""Defines the base of every error that flexlora raises on purpose."""

from flexlora.text import printable


class FlexLoraError(Exception):
    """Base of every error raised on purpose; its message names the rule, the value and the fix.

    Each argument is a line of its own. A line break within one comes from a name of somebody else's and is escaped, or
    a file could put lines of its own, such as another error, into the message.
    """

    def __str__(self) -> str:
        """Return the message, control characters of the names in it escaped."""
        return "\n".join(map(printable, map(str, self.args))) if len(self.args) > 1 else printable(super().__str__())
