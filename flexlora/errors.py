"""Defines the base of every error that flexlora raises on purpose."""


class FlexLoraError(Exception):
    """Base of every error raised on purpose; its message names the rule, the value and the fix."""
