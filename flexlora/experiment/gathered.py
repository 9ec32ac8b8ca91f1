"""Defines what is known of a run once its data are read: enough to choose clients and to count its work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from flexlora.experiment.config import Config
from flexlora.experiment.participants import Participants


class GatheredRun(Protocol):
    """A run whose participants are known, whether or not its base model is loaded."""

    @property
    def config(self) -> Config:
        """The run."""
        ...

    @property
    def participants(self) -> Participants:
        """Clients and data."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (out_features, in_features) of every module that some client adapts."""
        ...


@dataclass(frozen=True)
class Gathered:
    """A run whose base model is not loaded; for the attributes see ``GatheredRun``."""

    config: Config
    participants: Participants
    shapes: Mapping[str, tuple[int, int]]
