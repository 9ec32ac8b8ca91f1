"""Keeps examples in a file: one record an owner, written as they come and read when they are used.

A record is JSON: the instructions that occur, then one list per example of the number of its instruction, its input,
its outputs and its history, and if there are any its tools and the fields of its answer. Where records are and which
part their examples belong to is a small ``Owner`` each; nothing else of a corpus is kept in memory.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus
from flexlora.data.mapped_file import MappedFile

# Callers go through the parts of one owner in turn.
_RECORDS_KEPT = 8

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Record:
    """Where the examples of an owner are: ``size`` bytes from ``start`` on."""

    start: int
    size: int
    num_examples: int


@dataclass(frozen=True, slots=True)
class Owner:
    """A client or an unseen task: its record, whose first examples are for validation, the next for testing.

    Attributes:
        name: Client id or task id.
        category: As in ``ExampleSplits``.
        record: Where its examples are.
        num_validation: Examples for validation, those in ``dropped`` included.
        num_test: Examples for testing, likewise; all that follow are for training.
        dropped: Positions in the record that belong to no part.
    """

    name: str
    category: str
    record: Record
    num_validation: int
    num_test: int
    dropped: tuple[int, ...] = ()

    @property
    def num_train(self) -> int:
        """Examples for training."""
        return self.record.num_examples - self.num_validation - self.num_test


class ExampleFile:
    """A file of records.

    Args:
        path: None takes a file without a name, which is deleted when the process ends.
        writable: Whether records will be added.
    """

    def __init__(self, path: Path | None = None, *, writable: bool = True) -> None:
        self._file = MappedFile(path, writable=writable)
        self.read = lru_cache(maxsize=_RECORDS_KEPT)(self._decoded)

    def append(self, examples: Sequence[Example]) -> Record:
        """Add a record of these examples."""
        numbers: dict[str, int] = {}
        rows = [
            (
                numbers.setdefault(example.instruction, len(numbers)),
                example.input,
                example.outputs,
                example.history,
                *((example.tools, example.answer_fields) if example.tools or example.answer_fields else ()),
            )
            for example in examples
        ]
        # Examples made from Python may hold halves of surrogate pairs.
        content = _ENCODER.encode([list(numbers), rows]).encode("utf-8", "surrogatepass")
        return Record(self._file.append(content), len(content), len(examples))

    def view(self, record: Record) -> memoryview:
        """Return the bytes of a record without a copy."""
        return self._file.view(record.start, record.size)

    def flush(self) -> None:
        """Hand all records to the system, for other readers of the file."""
        self._file.flush()

    def _decoded(self, record: Record) -> tuple[Example, ...]:
        instructions, rows = json.loads(bytes(self.view(record)).decode("utf-8", "surrogatepass"))
        return tuple(
            Example(instructions[number], text, tuple(outputs), tuple(map(tuple, history)), *more)
            for number, text, outputs, history, *more in rows
        )


class StoredExamples(Sequence[Example]):
    """One part of an owner's examples; knows its length without reading."""

    __slots__ = ("_file", "_positions", "_record")

    def __init__(self, file: ExampleFile, record: Record, positions: Sequence[int]) -> None:
        self._file, self._record, self._positions = file, record, positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        chosen = self._positions[index]
        if isinstance(chosen, int):
            return self._file.read(self._record)[chosen]
        examples = self._file.read(self._record) if chosen else ()
        return tuple(examples[position] for position in chosen)

    def __iter__(self) -> Iterator[Example]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self[:] == tuple(other)

    def __hash__(self) -> int:
        return hash(self[:])

    def __repr__(self) -> str:
        return f"<{len(self)} stored examples>"


class StoredOwners(Mapping[str, ExampleSplits]):
    """Name -> examples of every owner in a file, sorted by name."""

    def __init__(self, file: ExampleFile, owners: Sequence[Owner]) -> None:
        self.owners = {owner.name: owner for owner in sorted(owners, key=lambda owner: owner.name)}
        self._file = file

    def __getitem__(self, name: str) -> ExampleSplits:
        owner = self.owners[name]
        tested = owner.num_validation + owner.num_test
        return ExampleSplits(
            self._part(owner, tested, owner.record.num_examples),
            self._part(owner, 0, owner.num_validation),
            self._part(owner, owner.num_validation, tested),
            owner.category,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)

    def _part(self, owner: Owner, start: int, stop: int) -> StoredExamples:
        positions: Sequence[int] = range(start, stop)
        if owner.dropped:
            positions = [position for position in positions if position not in owner.dropped]
        return StoredExamples(self._file, owner.record, positions)

    def digest(self) -> str:
        """Return a SHA-256 of names, parts and examples; where they are in the file does not matter."""
        digest = hashlib.sha256()
        for owner in self.owners.values():
            parts = (owner.record.num_examples, owner.num_validation, owner.num_test, owner.dropped)
            digest.update(repr((owner.name, owner.category, owner.record.size, parts)).encode())
            digest.update(self._file.view(owner.record))
        return digest.hexdigest()


def stored_corpus(
    file: ExampleFile, clients: Sequence[Owner], unseen: Sequence[Owner], folder: Path | None = None
) -> FederatedCorpus:
    """Return the corpus whose owners have their records in ``file``."""
    parts = {"clients": StoredOwners(file, clients), "unseen": StoredOwners(file, unseen)}
    hashes = {name: owners.digest() for name, owners in parts.items()}
    return FederatedCorpus(parts["clients"], parts["unseen"], hashes, folder)


def store_corpus(file: ExampleFile, corpus: FederatedCorpus) -> FederatedCorpus:
    """Return the same corpus with its examples in ``file`` and no longer in memory."""

    clients, unseen = (
        [_stored(file, name, splits) for name, splits in sorted(owners.items())]
        for owners in (corpus.clients, corpus.unseen)
    )
    return stored_corpus(file, clients, unseen)


def _stored(file: ExampleFile, name: str, splits: ExampleSplits) -> Owner:
    record = file.append([*splits.validation, *splits.test, *splits.train])
    return Owner(name, splits.category, record, len(splits.validation), len(splits.test))
