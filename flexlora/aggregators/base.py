"""Defines the protocol of every aggregation method, and what its states may be made of."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import isfinite
from typing import Any, Protocol, TypeVar, cast, get_args, get_type_hints, runtime_checkable

from torch import Tensor

from flexlora.aggregators.settings import traits_of
from flexlora.errors import FlexLoraError
from flexlora.federation.message_checks import check_broadcast
from flexlora.federation.messages import Broadcast, Change, CohortFactors, CohortProducts, Update
from flexlora.lora.factors import AdapterState, LoraFactors
from flexlora.lora.product import Spectrum

State = TypeVar("State")
StateIn = TypeVar("StateIn", contravariant=True)


class AggregationError(FlexLoraError, ValueError):
    """Updates or ranks that the method cannot work with."""


@runtime_checkable
class Aggregator(Protocol[State]):
    """A federated LoRA method: state in, state out; a checkpoint is that state saved.

    A state is made of frozen dataclasses, mappings with string keys, tuples, tensors, numbers, strings and None only,
    so that it can be saved without pickle. Its dataclasses are found through the return type of ``init`` and the types
    of their fields, so those have to name them.

    What must hold on all states: modules sorted by path, tensors without gradient and contiguous (others would round
    differently after a resume), nothing shared with what came in or goes out.
    """

    def init(self, adapter: AdapterState) -> State:
        """Return the state before round 1 from an adapter at server ranks: PEFT's random ``A`` and zero ``B``."""
        ...

    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        """Return the state after a round from the surviving updates (at least one), consumed once, one at a time."""
        ...

    def broadcast(self, state: State, ranks: Mapping[str, int]) -> Broadcast:
        """Return what a client with these ranks per module receives; ``trainable`` has exactly these ranks.

        With the trait ``fewer_directions`` it may have lower ones.
        """
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


Noise = Callable[[str, int, int], Tensor]
"""Name, height and width of a matrix -> independent noise in that shape, float64; the same if it is asked again."""


@runtime_checkable
class PrivateAggregator(Protocol[State]):
    """A method with the trait ``private_changes``: one client moves its state by no more than its own change."""

    def add_noisy_changes(self, state: State, changes: Iterable[Change], denominator: float, noise: Noise) -> State:
        """Return the state moved by ``(sum_i discount_i change_i + noise) / denominator``, and what follows from that.

        Weights of updates do not count, and nothing else of the changes may reach the state: with every
        ``discount_i change_i`` of norm at most ``C`` in the space that the trait names, adding or removing one client
        moves the sum by at most ``C``. There may be no change at all; the noise is added all the same.
        """
        ...


@runtime_checkable
class SumAggregator(Protocol[State]):
    """A method with the trait ``secure_sums``: it needs no more of a cohort than its sum."""

    def aggregate_sum(self, state: State, total: CohortFactors | CohortProducts) -> State:
        """Return the state that ``aggregate`` would return from the updates of the whole cohort."""
        ...


@runtime_checkable
class PerClientAggregator(Protocol[StateIn]):
    """A method with the trait ``per_client``: every client of a round receives something of its own."""

    def broadcast_to(self, state: StateIn, ranks: Mapping[str, int], client_id: str) -> Broadcast:
        """Return what this client with these ranks receives; the same however often it is asked for.

        Random choices are a pure function of a seed, of the round as the state knows it, and of ``client_id``, so that
        ``aggregate`` can repeat them from ``update.client_id``.
        """
        ...


def broadcasts_to_each(aggregator: Aggregator[Any]) -> bool:
    """Return whether every client of a round receives something of its own."""
    return traits_of(aggregator).per_client


def checked_broadcast(
    aggregator: Aggregator[Any], state: Any, ranks: Mapping[str, int], client_id: str | None = None
) -> Broadcast:
    """Return what a method sends to clients of these ranks, or to one client, after checking it.

    Raises:
        BroadcastError: If the method made a broadcast that nobody could use.
    """
    if client_id is None:
        broadcast = aggregator.broadcast(state, ranks)
    else:
        broadcast = cast("PerClientAggregator[Any]", aggregator).broadcast_to(state, ranks, client_id)
    check_broadcast(broadcast, ranks, fewer_directions=traits_of(aggregator).fewer_directions)
    return broadcast


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


def require_server_ranks(adapter: AdapterState, ranks: Mapping[str, int], who: str) -> None:
    """Raise unless ``ranks`` names, for every module, the rank of the server's adapter.

    Args:
        adapter: The server's.
        ranks: Module path -> rank of a client.
        who: What messages call the client.

    Raises:
        AggregationError: Naming the module and both ranks.
    """
    for module, factors in adapter.items():
        if ranks.get(module, 0) != factors.rank:
            raise AggregationError(
                f"this method needs one rank per module on every client, {factors.rank} in {module!r}; {who} has "
                f"{ranks.get(module, 0)}. Give all clients one rank (clients.distribution) or choose a method for "
                "mixed ranks, such as flexlora"
            )


def require_rank_within(server: LoraFactors, module: str, rank: int) -> None:
    """Raise unless ``rank`` is one that the server's factors can be cut to.

    Raises:
        AggregationError: Naming the module and both ranks.
    """
    if not 1 <= rank <= server.rank:
        raise AggregationError(
            f"this method needs ranks in 1..{server.rank}, the rank of the server's adapter in {module!r}; got {rank}. "
            "Start the server at the largest rank in clients.distribution"
        )


def state_types(aggregator: Aggregator[Any]) -> tuple[type, ...]:
    """Return the dataclasses that the states of a method may hold, from its type hints.

    Raises:
        AggregationError: If ``init`` has no return type, or one that cannot be resolved.
    """
    method = type(aggregator)
    try:
        state = get_type_hints(method.init).get("return")
        found: dict[type, None] = {}
        _collect(state, found)
    except NameError as error:
        raise AggregationError(f"type hints of {method.__name__} and of its state must resolve; {error}") from error
    if state is None:
        raise AggregationError(f"{method.__name__}.init must have a return type, which says what a checkpoint may hold")
    return tuple(found)


def check_state(state: Any, types: Iterable[type], name: str = "state") -> None:
    """Raise unless a checkpoint can save a state and read it back.

    Args:
        state: What ``init`` or ``aggregate`` returned.
        types: The dataclasses it may hold, as ``state_types`` returns them.
        name: What messages call it.

    Raises:
        AggregationError: Naming the part that cannot be saved.
    """
    if state is None or isinstance(state, Tensor | bool | int | float | str):
        return
    if isinstance(state, Mapping):
        for key, item in cast("Mapping[Any, Any]", state).items():
            if not isinstance(key, str):
                raise AggregationError(f"{name}: keys of mappings in a state must be strings; got {key!r}")
            check_state(item, types, f"{name}/{key}")
    elif type(state) is tuple:  # A named tuple would come back without its names.
        for index, item in enumerate(cast("tuple[Any, ...]", state)):
            check_state(item, types, f"{name}/{index}")
    elif type(state) in types:
        for field in dataclasses.fields(state):
            if not field.init:
                raise AggregationError(
                    f"{name}/{field.name}: every field of a state must be one that its class is made with; this one "
                    "has init=False"
                )
            check_state(getattr(state, field.name), types, f"{name}/{field.name}")
    else:
        raise AggregationError(
            f"{name}: a state may hold frozen dataclasses that the return type of init leads to, mappings, plain "
            f"tuples, tensors, numbers, strings and None; got {type(state).__name__}"
        )


def _collect(hint: object, found: dict[type, None]) -> None:
    """Add the dataclasses that a type hint leads to."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
        found[hint] = None
        for field_hint in get_type_hints(hint).values():
            _collect(field_hint, found)
    for argument in get_args(hint):
        _collect(argument, found)
