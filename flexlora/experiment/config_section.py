"""Defines the base of every section of a configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a configuration: frozen, and without settings it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
