"""One step between client and server, and the order in which steps run."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch

from flexlora.clients import Update


@runtime_checkable
class UplinkStep(Protocol):
    """Something done to an update on its way, both ends of it."""

    def send(self, update: Update, rng: torch.Generator) -> Update:
        """Return what leaves the client."""
        ...

    def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
        """Yield what goes on towards the aggregator: one per update, or one for a whole cohort."""
        ...


def send(steps: Sequence[UplinkStep], update: Update, rng: torch.Generator) -> Update:
    """Return ``update`` after the client's end of every step, in order."""
    for step in steps:
        update = step.send(update, rng)
    return update


def receive(steps: Sequence[UplinkStep], updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
    """Yield the updates after the server's end of every step, in reversed order, without collecting them."""
    for step in reversed(steps):
        updates = step.receive(updates, rng)
    yield from updates
