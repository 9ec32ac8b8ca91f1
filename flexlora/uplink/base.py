"""Defines a step between client and server, and the order in which steps run."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch

from flexlora.federation.messages import Update


@runtime_checkable
class UplinkStep(Protocol):
    """Something done to an update on its way, both ends of it.

    What leaves ``send`` travels as factors and is checked on arrival, client by client: it must keep modules, ranks and
    scalings and stay finite, or its client counts as failed. A step that concerns one end only, such as noise added by
    the server, returns at the other end what it was given. An error in ``send`` fails that client; a ``FlexLoraError``
    in ``receive`` loses the round's updates, and the state is kept.
    """

    def send(self, update: Update, rng: torch.Generator) -> Update:
        """Return what leaves the client."""
        ...

    def receive(self, updates: Iterable[Update], rng: torch.Generator) -> Iterator[Update]:
        """Yield what goes on towards the aggregator: one per update, or one for a whole cohort.

        The updates are those of the clients that did not fail, in cohort order; which are missing is known only at the
        end.
        """
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
