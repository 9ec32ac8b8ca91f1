"""Deals rows to clients: rows held out as unseen tasks, clients by one of three partitions, splits inside each client.

Rows that share a prompt stay together: on one side of every split, and where they are tested on, as one example that
accepts the answers of all. Prompts that some client trains on are then left out of all validation and test parts, those
of unseen tasks included.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flexlora.data.corpus_file import ExampleFile, Owner, stored_corpus
from flexlora.data.examples import FederatedCorpus
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.partition import Indices, by_id, dirichlet, iid, train_validation_test
from flexlora.data.rows import StoredRows
from flexlora.federation.streams import stream

PartitionName = Literal["natural", "dirichlet", "iid"]

DEFAULT_NUM_CLIENTS = 100
HELD_OUT = "held-out"


@dataclass(frozen=True)
class RowDealing:
    """How rows are dealt to clients, and which rows no client has.

    Attributes:
        partition: ``natural`` (a client has the rows that name it), ``dirichlet`` over labels, or ``iid``.
        num_clients: None takes all natural clients, else 100.
        dirichlet_alpha: Concentration; small is uneven.
        min_examples: Fewest rows of a client, 3 or more. Natural clients with fewer are left out; the other
            partitions guarantee it or fail.
        unseen_labels: Labels that no client has; each is one unseen task.
        unseen_owners: Natural clients held out with all their rows; each is one unseen task.
        unseen_fraction: Without unseen labels or owners, the share of rows held out; one unseen task per label, if
            there are labels.
    """

    partition: PartitionName = "iid"
    num_clients: int | None = None
    dirichlet_alpha: float = 0.5
    min_examples: int = 10
    unseen_labels: Sequence[str] = ()
    unseen_owners: Sequence[str] = ()
    unseen_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.partition not in ("natural", "dirichlet", "iid"):
            raise InstructionDataError(f"data.partition must be natural, dirichlet or iid; got {self.partition!r}")
        if self.min_examples < 3:
            raise InstructionDataError(
                "data.min_examples must be 3 or more, one for each of training, validation and test; "
                f"got {self.min_examples}"
            )
        if not 0 <= self.unseen_fraction < 1:
            raise InstructionDataError(
                f"data.unseen_fraction must be at least 0 and below 1; got {self.unseen_fraction}"
            )


@dataclass(frozen=True)
class InstructionSummary:
    """Counts of rows, clients and examples, and of everything left out.

    Attributes:
        num_rows: Rows read.
        num_clients: Clients made.
        num_unseen: Unseen tasks made.
        num_empty: Rows left out because their prompt or their answer is empty.
        num_repeated: Rows whose prompt an earlier one has; all are trained on, on one side of every split.
        num_too_small: Natural clients left out for having too few rows.
        num_not_drawn: Natural clients left out because ``num_clients`` was reached.
        num_leaked: Examples taken out of validation and test parts because some client trains on the same prompt.
        num_train: Training examples of all clients.
        num_validation: Validation examples of all clients.
        num_test: Test examples of all clients.
        num_unseen_test: Examples of unseen tasks.
        notes: Sentences about what was skipped, not used or repaired, and about sizes of clients.
    """

    num_rows: int
    num_clients: int
    num_unseen: int
    num_empty: int
    num_repeated: int
    num_too_small: int
    num_not_drawn: int
    num_leaked: int
    num_train: int
    num_validation: int
    num_test: int
    num_unseen_test: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Parts:
    """The rows of a client or of an unseen task, by number; those tested on in groups that share a prompt."""

    train: Sequence[int]
    validation: Sequence[Sequence[int]]
    test: Sequence[Sequence[int]]
    category: str


def deal_rows(
    rows: StoredRows, seed: int, dealing: RowDealing, file: ExampleFile, source: str
) -> tuple[FederatedCorpus, InstructionSummary]:
    """Return the rows dealt to clients, 80/10/10 inside each, and what was left out.

    Args:
        file: Where the examples of clients and unseen tasks are written.
        source: What error messages call the data.

    Raises:
        InstructionDataError: A label or owner to hold out is unknown, or no row is left to clients or to be scored.
        PartitionError: There are too few rows for so many clients.
    """
    held_out = _hold_out(rows, dealing, seed)
    taken = {number for groups in held_out.values() for group in groups for number in group}
    left = rows.groups(number for number in range(len(rows)) if number not in taken)
    if not left:
        raise InstructionDataError(f"{source}: no row is left for clients: {_why_nothing_is_left(rows, dealing)}")
    dealt, num_too_small, num_not_drawn = _deal(rows, left, dealing, seed)
    clients = {name: _split(rows, name, [left[index] for index in part], seed) for name, part in dealt.items()}
    unseen = {name: _Parts((), (), groups, _category(rows, groups)) for name, groups in held_out.items()}
    trained = {prompt for parts in clients.values() for number in parts.train for prompt in rows.prompts(number)}
    stored, stored_unseen = (
        [_write(rows, name, parts, trained, file) for name, parts in sorted(owners.items())]
        for owners in (clients, unseen)
    )
    trained_only = [owner.name for owner in stored_unseen if not owner.num_test]
    if trained_only and len(trained_only) == len(stored_unseen):
        raise InstructionDataError(
            f"{source}: nothing is left to be scored: clients train on the prompts of everything held out; give rows "
            "prompts that differ, for example with data.columns={context: COLUMN} for the column that tells them apart"
        )
    stored_unseen = [owner for owner in stored_unseen if owner.num_test]
    num_tested = sum(
        len(rows.prompts(group[0])) for parts in (*clients.values(), *unseen.values()) for group in _tested(parts)
    )
    num_scored = sum(owner.num_validation + owner.num_test for owner in (*stored, *stored_unseen))
    return stored_corpus(file, stored, stored_unseen), InstructionSummary(
        num_rows=rows.num_read,
        num_clients=len(stored),
        num_unseen=len(stored_unseen),
        num_empty=rows.num_empty,
        num_repeated=rows.num_repeated,
        num_too_small=num_too_small,
        num_not_drawn=num_not_drawn,
        num_leaked=num_tested - num_scored,
        num_train=sum(owner.num_train for owner in stored),
        num_validation=sum(owner.num_validation for owner in stored),
        num_test=sum(owner.num_test for owner in stored),
        num_unseen_test=sum(owner.num_test for owner in stored_unseen),
        notes=(*_trained_noted(trained_only), *_sizes_noted(dealt, left, dealing)),
    )


def _hold_out(rows: StoredRows, dealing: RowDealing, seed: int) -> dict[str, list[list[int]]]:
    """Return unseen task -> its groups of rows in random order."""
    labels, owners = dealing.unseen_labels, dealing.unseen_owners
    if labels:
        _check_known("data.unseen_labels", "labels", labels, rows.labels)
        groups = rows.groups(number for number, label in enumerate(rows.labels) if label in labels)
    elif owners:
        _check_known("unseen_owners", "owners", owners, rows.clients)
        groups = rows.groups(number for number, client in enumerate(rows.clients) if client in owners)
    else:
        fraction, groups = dealing.unseen_fraction, rows.groups(range(len(rows)))
        order = stream(seed, "held-out-rows").permutation(len(groups))
        drawn = order[: max(round(fraction * len(groups)), int(fraction > 0))]
        groups = [groups[index] for index in sorted(drawn.tolist())]
    tasks: dict[str, list[list[int]]] = {}
    group_of = {group[0]: group for group in groups}
    for number in stream(seed, "unseen-order").permutation(len(rows)).tolist():
        if number in group_of:
            label = rows.labels[number]
            unnamed = f"{HELD_OUT}-{label}" if label else HELD_OUT
            name = label if labels else rows.clients[number] if owners else unnamed
            tasks.setdefault(name, []).append(group_of[number])
    return tasks


def _why_nothing_is_left(rows: StoredRows, dealing: RowDealing) -> str:
    """Return why all rows are held out, or there are none, and what to change."""
    if not len(rows):
        return f"none of the {rows.num_read:,} rows has both a prompt and an answer; fill them"
    if dealing.unseen_labels:
        return "data.unseen_labels names the labels of all of them; leave one to the clients"
    if dealing.unseen_owners:
        return "unseen_owners names the owners of all of them; leave one to be a client"
    if rows.num_groups == 1:
        return (
            f"all {len(rows):,} share one prompt, and rows of one prompt are held out together; give them prompts that "
            "differ, for example with data.columns={context: COLUMN} for the column that tells them apart"
        )
    return (
        f"data.unseen_fraction={dealing.unseen_fraction:g} holds out all {rows.num_groups} prompts; lower it, for "
        f"example to {1 / rows.num_groups:.2g}"
    )


def _trained_noted(names: Sequence[str]) -> tuple[str, ...]:
    """Return a sentence about unseen tasks of which nothing is left."""
    return (f"Not scored (clients train on all their prompts): {', '.join(names)}.",) if names else ()


def _sizes_noted(dealt: Mapping[str, Indices], left: Sequence[Sequence[int]], dealing: RowDealing) -> tuple[str, ...]:
    """Return a sentence about clients that have no more than the fewest rows, which a Dirichlet draw does not say."""
    if dealing.partition != "dirichlet":
        return ()
    sizes = [sum(len(left[index]) for index in part) for part in dealt.values()]
    num_smallest = sum(size <= dealing.min_examples for size in sizes)
    if not num_smallest:
        return ()
    return (
        f"{num_smallest:,} of {len(sizes):,} clients have data.min_examples={dealing.min_examples} rows, the fewest "
        f"allowed: data.dirichlet_alpha={dealing.dirichlet_alpha:g} leaves them fewer, and rows of the largest clients "
        f"fill them up. The largest client has {max(sizes):,}.",
    )


def _check_known(key: str, noun: str, asked: Sequence[str], found: Iterable[str]) -> None:
    known = set(found)
    unknown = sorted(set(asked) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(known), n=3, cutoff=0.4) or sorted(known)[:10]
        raise InstructionDataError(
            f"{key} must name {noun} of the data; {unknown[0]!r} is not one of them; similar: {', '.join(near)}"
        )


def _deal(
    rows: StoredRows, left: Sequence[Sequence[int]], dealing: RowDealing, seed: int
) -> tuple[dict[str, Indices], int, int]:
    """Return client id -> indices into ``left``, and how many natural clients were too small or not drawn."""
    if dealing.partition == "natural":
        return _deal_natural(rows, left, dealing, seed)
    rng = stream(seed, "partition")
    size = DEFAULT_NUM_CLIENTS if dealing.num_clients is None else dealing.num_clients
    num_rows = [len(group) for group in left]
    if dealing.partition == "iid":
        parts = iid(len(left), size, rng, dealing.min_examples, num_rows)
    else:
        labels = [rows.labels[group[0]] for group in left]
        parts = dirichlet(labels, size, dealing.dirichlet_alpha, rng, dealing.min_examples, num_rows)
    width = max(len(str(size - 1)), 4)
    return {f"client-{number:0{width}d}": part for number, part in enumerate(parts)}, 0, 0


def _deal_natural(
    rows: StoredRows, left: Sequence[Sequence[int]], dealing: RowDealing, seed: int
) -> tuple[dict[str, Indices], int, int]:
    owned = by_id([rows.clients[group[0]] for group in left])
    sizes = {name: sum(len(left[index]) for index in part) for name, part in owned.items()}
    large = {name: part for name, part in owned.items() if sizes[name] >= dealing.min_examples}
    if not large:
        raise InstructionDataError(
            f"no owner has data.min_examples={dealing.min_examples} rows; the largest of {len(owned)} has "
            f"{max(sizes.values())}: lower data.min_examples, which may be 3, or hold out fewer rows"
        )
    wanted = len(large) if dealing.num_clients is None else dealing.num_clients
    if not 1 <= wanted <= len(large):
        raise InstructionDataError(
            f"data.num_clients must be in 1..{len(large)}, the natural clients with "
            f"data.min_examples={dealing.min_examples} rows or more (of {len(owned)}); got {wanted}"
        )
    candidates = list(large)
    order = stream(seed, "natural-clients").permutation(len(candidates))[:wanted]
    names = sorted(candidates[index] for index in order)
    return {name: large[name] for name in names}, len(owned) - len(large), len(large) - wanted


def _split(rows: StoredRows, client_id: str, groups: Sequence[Sequence[int]], seed: int) -> _Parts:
    parts = train_validation_test(len(groups), stream(seed, "row-split", client_id))
    train, validation, test = ([groups[index] for index in part] for part in parts)
    return _Parts([number for group in train for number in group], validation, test, _category(rows, groups))


def _category(rows: StoredRows, groups: Sequence[Sequence[int]]) -> str:
    """Return the label that all these rows have; empty if they have several."""
    labels = {rows.labels[number] for group in groups for number in group}
    return labels.pop() if len(labels) == 1 else ""


def _tested(parts: _Parts) -> list[Sequence[int]]:
    return [*parts.validation, *parts.test]


def _write(rows: StoredRows, name: str, parts: _Parts, trained: set[bytes], file: ExampleFile) -> Owner:
    """Write the examples of a client or an unseen task, those tested on only if nobody trains on their prompt."""
    validation, test = (
        [
            example
            for group in part
            for prompt, example in zip(rows.prompts(group[0]), rows.merged(group), strict=True)
            if prompt not in trained
        ]
        for part in (parts.validation, parts.test)
    )
    train = [example for number in parts.train for example in rows.examples(number)]
    return Owner(name, parts.category, file.append([*validation, *test, *train]), len(validation), len(test))
