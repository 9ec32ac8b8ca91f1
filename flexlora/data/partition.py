"""Deals rows to clients: one index array per client, from labels or at random."""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flexlora.errors import FlexLoraError

Indices = NDArray[np.int64]
Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class PartitionError(FlexLoraError, ValueError):
    """The rows cannot be dealt as asked; the message says how many clients are possible."""


class HasValidation(Protocol[Item_co]):
    """Anything with a validation part, such as the examples of one client."""

    @property
    def validation(self) -> Sequence[Item_co]:
        """The examples for validation."""
        ...


def iid(
    num_items: int,
    num_clients: int,
    rng: np.random.Generator,
    min_rows: int = 1,
    num_rows: Sequence[int] | None = None,
) -> list[Indices]:
    """Return one sorted index array per client: a random deal, sizes differing by at most one.

    Args:
        num_items: Rows, or groups of rows that stay together.
        num_clients: Index arrays to make.
        rng: Source of randomness.
        min_rows: Fewest rows of a client.
        num_rows: Rows of each item, 1 by default; with larger groups, numbers of rows are as even as these allow.

    Raises:
        PartitionError: Some client would have fewer than ``min_rows`` rows.
    """
    weights = _weights(num_items, num_clients, min_rows, num_rows)
    order = rng.permutation(num_items)
    if weights.max(initial=1) == 1:
        return [np.sort(part) for part in np.array_split(order, num_clients)]
    dealt: list[list[int]] = [[] for _ in range(num_clients)]
    sizes = [(0, client) for client in range(num_clients)]
    for item in order.tolist():
        size, client = heapq.heappop(sizes)
        dealt[client].append(item)
        heapq.heappush(sizes, (size + int(weights[item]), client))
    _fill_up(dealt, min_rows, rng, weights)
    return [np.sort(np.array(client, dtype=np.int64)) for client in dealt]


def dirichlet(
    labels: Sequence[Hashable],
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_rows: int = 1,
    num_rows: Sequence[int] | None = None,
) -> list[Indices]:
    """Return one sorted index array per client, each label spread over clients by its own Dirichlet draw.

    For every label ``c``: ``p_c ~ Dirichlet(alpha, ..., alpha)`` over the clients, and client ``k`` gets the share
    ``p_ck`` of the label's rows, rounded so that all rows are dealt (arXiv:1905.12022). A small ``alpha``
    leaves most of a label with few clients, a large one approaches ``iid``.

    Clients below ``min_rows`` are then filled up, one item at a time, with a random item of the client that has most;
    with ``min_rows=0`` the draw is left as it is.

    Args:
        labels: The label of every item: a row, or a group of rows that stay together.
        num_clients: Index arrays to make.
        alpha: Concentration, above 0.
        rng: Source of randomness.
        min_rows: Fewest rows of a client.
        num_rows: Rows of each item, 1 by default.

    Raises:
        PartitionError: ``alpha`` is not above 0, or there are fewer than ``num_clients * min_rows`` rows.
    """
    if not alpha > 0:
        raise PartitionError(f"data.dirichlet_alpha must be above 0; got {alpha}: 0.5 is uneven, 100 is nearly even")
    weights = _weights(len(labels), num_clients, min_rows, num_rows)
    dealt: list[list[int]] = [[] for _ in range(num_clients)]
    for items in _rows_by_label(labels).values():
        shares = rng.dirichlet(np.full(num_clients, alpha))
        bounds = np.rint(np.cumsum(shares)[:-1] * weights[items].sum()).astype(np.int64)
        order = rng.permutation(items)
        cuts = np.searchsorted(np.cumsum(weights[order]), bounds, side="right")
        for client, part in zip(dealt, np.split(order, cuts), strict=True):
            client.extend(part.tolist())
    _fill_up(dealt, min_rows, rng, weights)
    return [np.sort(np.array(client, dtype=np.int64)) for client in dealt]


def by_id(ids: Sequence[str], min_rows: int = 1) -> dict[str, Indices]:
    """Return id -> sorted indices of the rows that carry it, ids sorted: tasks, authors, hospitals.

    Raises:
        PartitionError: Some id has fewer than ``min_rows`` rows.
    """
    parts = {str(name): np.array(rows, dtype=np.int64) for name, rows in sorted(_rows_by_label(ids).items())}
    small = [name for name, rows in parts.items() if len(rows) < min_rows]
    if small:
        raise PartitionError(
            f"every client needs {min_rows} rows or more; {len(small)} of {len(parts)} have fewer, for example "
            f"{small[0]!r} with {len(parts[small[0]])}: {len(parts) - len(small)} clients are possible; "
            "lower data.min_examples or leave the small ones out"
        )
    return parts


def train_validation_test(num_rows: int, rng: np.random.Generator) -> tuple[Indices, Indices, Indices]:
    """Return three disjoint index arrays in random order: 80, 10 and 10 % of the rows.

    Validation and test have the same size and, from three rows on, at least one row each.
    """
    order = rng.permutation(num_rows)
    held_out = max(round(num_rows / 10), 1) if num_rows >= 3 else 0
    return order[2 * held_out :], order[:held_out], order[held_out : 2 * held_out]


def fixed_validation(
    clients: Mapping[str, HasValidation[Item]], num_examples: int, rng: np.random.Generator
) -> tuple[Item, ...]:
    """Return up to ``num_examples`` examples from the validation parts of as many clients as possible.

    Clients give one example each, in a random order, then a second one each, until there are enough. The result does
    not depend on the order of the mapping.
    """
    names = sorted(clients)
    parts = [clients[names[index]].validation for index in rng.permutation(len(names))]
    turns = range(max((len(part) for part in parts), default=0))
    in_turn = (part[turn] for turn in turns for part in parts if turn < len(part))
    return tuple(example for example, _ in zip(in_turn, range(num_examples), strict=False))


def _weights(num_items: int, num_clients: int, min_rows: int, num_rows: Sequence[int] | None) -> Indices:
    """Return the rows of each item.

    Raises:
        PartitionError: There is not enough for so many clients.
    """
    weights = np.ones(num_items, np.int64) if num_rows is None else np.asarray(num_rows, np.int64)
    total = int(weights.sum())
    if num_clients < 1:
        raise PartitionError(f"data.num_clients must be 1 or more; got {num_clients}")
    if total < num_clients * min_rows:
        raise PartitionError(
            f"{num_clients} clients with at least {min_rows} rows each need {num_clients * min_rows} rows; got "
            f"{total}, enough for {total // min_rows}: lower data.num_clients or data.min_examples"
        )
    return weights


def _rows_by_label(labels: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    rows: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        rows.setdefault(label, []).append(index)
    return dict(sorted(rows.items(), key=lambda item: str(item[0])))


def _fill_up(dealt: list[list[int]], min_rows: int, rng: np.random.Generator, weights: Indices) -> None:
    """Move items to clients with fewer than ``min_rows`` rows, each from the client that has most.

    Raises:
        PartitionError: No client can give an item away and keep enough.
    """
    sizes = np.array([int(weights[client].sum()) for client in dealt])
    is_single = weights.max(initial=1) == 1
    for poor in np.flatnonzero(sizes < min_rows):
        while sizes[poor] < min_rows:
            rich = int(np.argmax(sizes))
            places: Sequence[int] = range(len(dealt[rich]))
            if not is_single:
                rich, places = _can_give(dealt, sizes, min_rows, weights)
            item = dealt[rich].pop(places[int(rng.integers(len(places)))])
            dealt[poor].append(item)
            sizes[poor] += weights[item]
            sizes[rich] -= weights[item]


def _can_give(
    dealt: Sequence[Sequence[int]], sizes: Indices, min_rows: int, weights: Indices
) -> tuple[int, Sequence[int]]:
    """Return the largest client that can give an item away, and where in it such items are."""
    for rich in np.argsort(-sizes, kind="stable").tolist():
        places = [place for place, item in enumerate(dealt[rich]) if sizes[rich] - weights[item] >= min_rows]
        if places:
            return rich, places
    raise PartitionError(
        f"{len(dealt)} clients with at least {min_rows} rows each are not possible with {len(weights)} different "
        "prompts, as rows that share a prompt stay together: lower data.num_clients or data.min_examples"
    )
