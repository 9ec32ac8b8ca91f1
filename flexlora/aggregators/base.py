"""The one protocol behind which every aggregation method stands."""

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import Protocol, TypeVar, runtime_checkable

from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Broadcast, Change, Update
from flexlora.lora.factors import AdapterState
from flexlora.lora.product import Spectrum

State = TypeVar("State")


class AggregationError(FlexLoraError, ValueError):
    """Updates or ranks that the method cannot work with."""


@runtime_checkable
class Aggregator(Protocol[State]):
    """A federated LoRA method: state in, state out; a checkpoint is that state saved.

    A state is made of frozen dataclasses, mappings with string keys, tuples, tensors, numbers, strings and None only,
    so that it can be saved without pickle.
    """

    def init(self, adapter: AdapterState) -> State:
        """Return the state before round 1 from an adapter at server ranks: PEFT's random ``A`` and zero ``B``."""
        ...

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """Return the state after a round from the surviving updates (at least one), consumed once, one at a time."""
        ...

    def broadcast(self, state: State, ranks: Mapping[str, int]) -> Broadcast:
        """Return what a client with these ranks per module receives; ``trainable`` has exactly these ranks."""
        ...

    def spectra(self, state: State) -> Mapping[str, Spectrum]:
        """Return the global change of every module, its ``tail`` being what the last round brought and was not kept.

        For records and figures: modules in sorted order, float64, scaling included.
        """
        ...


@runtime_checkable
class ChangeAggregator(Protocol[State]):
    """A method whose state is a sum, to which changes can be added whenever they come."""

    def add_changes(self, state: State, changes: Iterable[Change]) -> State:
        """Return the state with the discounted mean of the changes (at least one) added, consumed once."""
        ...


def weighed(state_modules: Iterable[str], updates: Iterable[Update]) -> Iterator[Update]:
    """Yield the updates one at a time, each checked to have a usable weight and only modules of the server.

    Raises:
        AggregationError: At the update that breaks the rule; at the end if the weights do not add up to more than 0.
    """
    modules = frozenset(state_modules)
    total = 0.0
    for update in updates:
        if not (isfinite(update.weight) and update.weight >= 0):
            raise AggregationError(
                f"an update needs a finite weight of at least 0; got {update.weight} from {update.client_id!r}"
            )
        surplus = sorted(update.payload.keys() - modules)
        if surplus:
            raise AggregationError(
                f"an update may only hold modules of the server's adapter; got {surplus[0]!r} from {update.client_id!r}"
            )
        total += update.weight
        yield update
    if total <= 0:
        raise AggregationError(f"the weights of a round must add up to more than 0; got {total}")
