"""Defines the error of data that cannot be read or dealt as asked."""

from flexlora.errors import FlexLoraError


class InstructionDataError(FlexLoraError, ValueError):
    """The data cannot be read or dealt as asked; the message names the file and the row."""
