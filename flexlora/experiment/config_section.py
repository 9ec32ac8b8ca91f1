"""Defines the base of every section of a configuration."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A part of a configuration: frozen, without settings it does not know, and where yes is no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, values: Any) -> Any:
        """Return the settings, those that give true or false for a number so that they are refused."""
        if not isinstance(values, dict):
            return values
        numbers = {name for name, field in cls.model_fields.items() if _is_number(field.annotation)}
        return {name: _no_number(value) if name in numbers else value for name, value in values.items()}


class Truth:
    """True or false, which YAML also writes as yes, no, on and off, where a number is meant.

    To pydantic, which would read them as 1 and 0, this is of no type that it knows.
    """

    def __init__(self, value: bool) -> None:
        self.value = value

    def __repr__(self) -> str:
        """Return the value as YAML writes it."""
        return "true (in YAML also yes and on)" if self.value else "false (in YAML also no and off)"


def _no_number(value: Any) -> Any:
    """Return a value with every true and false in it replaced."""
    if isinstance(value, dict):
        return {name: _no_number(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_no_number(part) for part in value]
    return Truth(value) if isinstance(value, bool) else value


def _is_number(annotation: Any) -> bool:
    """Return whether a type is, or holds, numbers and no truth values; sections look after their own fields."""
    parts = _parts(annotation)
    return bool(parts & {int, float}) and bool not in parts


def _parts(annotation: Any) -> set[Any]:
    """Return the plain types that an annotation is made of."""
    inner = [part for part in get_args(annotation) if not isinstance(part, str)]
    return {annotation if isinstance(annotation, type) else None}.union(*map(_parts, inner))
