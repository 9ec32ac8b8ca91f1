"""Defines a step between client and server, the order in which steps run, and sums that no step may look into."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from flexlora.federation.messages import Broadcast, ClientFailure, CohortFactors, CohortProducts, Update
from flexlora.uplink.phases import Ask, ClientPhases


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


@dataclass
class PhaseCost:
    """What a phase cost.

    Attributes:
        kind: Of the phase.
        num_asked: Clients that were asked.
        num_answered: Clients whose answer could be used.
        down_bytes: Of all requests.
        up_bytes: Of all replies.
        seconds: Wall time.
    """

    kind: str
    num_asked: int
    num_answered: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
    seconds: float = 0.0


@dataclass
class Traffic:
    """What the phases of a round have cost so far.

    Attributes:
        costs: Of each phase, in order.
        failures: Client -> why it dropped out.
        up_bytes: Client -> bytes of its replies.
        down_bytes: Client -> bytes of its requests.
    """

    costs: list[PhaseCost] = field(default_factory=list[PhaseCost])
    failures: dict[str, ClientFailure] = field(default_factory=dict[str, ClientFailure])
    up_bytes: dict[str, int] = field(default_factory=dict[str, int])
    down_bytes: dict[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class SummedCohort:
    """Who is summed, as the server knows them.

    Attributes:
        slot_of: Client -> the place of what it was sent in ``broadcasts``.
        weights: Client -> its weight, an integer.
        broadcasts: What clients were sent, as it arrived.
        shapes: Module -> ``(out_features, in_features)``.
        server_ranks: Module -> rank that factors are padded to.
        server_round: The round.
        seed: Of the run.
        learning_rate: Of the round.
    """

    slot_of: Mapping[str, int]
    weights: Mapping[str, float]
    broadcasts: Sequence[Broadcast]
    shapes: Mapping[str, tuple[int, int]]
    server_ranks: Mapping[str, int]
    server_round: int
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class SecureTotal:
    """What secure sums tell of a cohort.

    Attributes:
        total: For the method.
        survivors: Whose numbers are in it.
        train_loss: Mean over the examples of all in the first sum, None if nobody measured it.
        num_clipped: Numbers that were beyond their bound, over all clients and sums.
        sketch_error: Estimated distance of the sketched sums from the true ones over their norm, all modules together;
            0 where products travel, None where factors are summed.
    """

    total: CohortFactors | CohortProducts
    survivors: Sequence[str]
    train_loss: float | None
    num_clipped: int
    sketch_error: float | None


@runtime_checkable
class CohortStep(Protocol):
    """Adds up what a cohort trained and holds, in further phases of its round, without seeing a single update."""

    @property
    def phases(self) -> ClientPhases:
        """What clients do."""
        ...

    def total(self, cohort: SummedCohort, ask: Ask, traffic: Traffic) -> SecureTotal:
        """Return the sum over those that survive, and note in ``traffic`` what the phases cost.

        Raises:
            FlexLoraError: If there is none; nothing is known of the cohort then.
        """
        ...
