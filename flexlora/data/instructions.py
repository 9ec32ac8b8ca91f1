"""Loads instruction data: rows of a file, a folder or a hub data set, dealt to clients.

corpus, summary = load_instructions("dolly.jsonl", seed=0, partition="dirichlet", label_column="category",
                                    num_clients=200, unseen_labels=("closed_qa",))
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flexlora.data.cells import name_of
from flexlora.data.corpus_file import ExampleFile
from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import FederatedCorpus
from flexlora.data.found_values import column_list
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_files import read_rows
from flexlora.data.instruction_schemas import RowReader
from flexlora.data.row_dealing import InstructionSummary, PartitionName, RowDealing, deal_rows
from flexlora.data.rows import Row, StoredRows

ClientFrom = Literal["column", "file"]


def load_instructions(
    path: Path | str,
    seed: int,
    *,
    partition: PartitionName = "iid",
    num_clients: int | None = None,
    dirichlet_alpha: float = 0.5,
    min_examples: int = 10,
    label_column: str | None = None,
    client_column: str | None = None,
    client_from: ClientFrom = "column",
    columns: Mapping[str, str] | None = None,
    trains_all: bool = False,
    unseen_labels: Sequence[str] = (),
    unseen_fraction: float = 0.0,
    file: ExampleFile | None = None,
) -> tuple[FederatedCorpus, InstructionSummary]:
    """Return the rows dealt to clients, 80/10/10 inside each, and what was left out.

    Args:
        path: A file, a folder or a hub id, as ``read_rows`` takes it.
        partition: ``natural`` by ``client_column`` or by file, ``dirichlet`` over ``label_column``, or ``iid``.
        num_clients: None takes all natural clients, else 100.
        dirichlet_alpha: Concentration; small is uneven.
        min_examples: Fewest rows of a client, 3 or more. Natural clients with fewer are left out; the other
            partitions guarantee it or fail.
        label_column: Column of labels; also the category of clients with a single label and of unseen tasks.
        client_column: Column of the owners of rows.
        client_from: ``file`` makes the name of each row's file its owner, without endings; ``column`` does not.
        columns: Our column name -> the one in the data, for example ``{"instruction": "question"}``.
        trains_all: Whether the loss looks at all tokens, which rows of nothing but a ``text`` need.
        unseen_labels: Labels that no client has; each is one unseen task.
        unseen_fraction: Without unseen labels, the share of rows held out; one unseen task per label, if there are
            labels.
        file: Where examples are written; None takes a file that is deleted when the process ends.

    Raises:
        InstructionDataError: The data cannot be read, a row is broken, or a column or label is unknown.
        PartitionError: There are too few rows for so many clients.
    """
    if partition == "natural" and client_column is None and client_from == "column":
        raise InstructionDataError(
            "data.partition=natural needs the owner of every row; set data.client_column, or data.client_from to file "
            "if every owner has a file"
        )
    if (partition == "dirichlet" or unseen_labels) and label_column is None:
        wanted = "data.partition=dirichlet" if partition == "dirichlet" else "data.unseen_labels"
        raise InstructionDataError(f"{wanted} needs a label for every row; set data.label_column")
    dealing = RowDealing(
        partition=partition,
        num_clients=num_clients,
        dirichlet_alpha=dirichlet_alpha,
        min_examples=min_examples,
        unseen_labels=unseen_labels,
        unseen_fraction=unseen_fraction,
    )
    rows, notes = StoredRows(within_clients=partition == "natural"), DataNotes()
    taken = tuple(column for column in (label_column, client_column) if column is not None)
    reader = RowReader(notes, columns or {}, trains_all, taken)
    for row in read_instructions(path, reader, label_column, None if client_from == "file" else client_column):
        if client_from == "file" and not row.client:
            raise InstructionDataError(f"data.client_from=file needs files of data; {path} is a hub data set")
        rows.add(row)
    corpus, summary = deal_rows(rows, seed, dealing, file or ExampleFile(), str(path))
    return corpus, replace(summary, notes=(*notes.sentences(), *summary.notes))


def read_instructions(
    path: Path | str,
    reader: RowReader | None = None,
    label_column: str | None = None,
    client_column: str | None = None,
) -> Iterator[Row]:
    """Yield every row of the data; one without prompt or answer has no examples.

    Args:
        path: As in ``load_instructions``.
        reader: Makes examples of a row, and is told what is not used.
        label_column: As in ``load_instructions``.
        client_column: Column of the owners; without one, the name of a row's file is its owner.

    Raises:
        InstructionDataError: The data cannot be read, fit no schema, or a row is broken.
    """
    reader = RowReader(DataNotes(), {}) if reader is None else reader
    is_empty = True
    for row in read_rows(path, reader.notes):
        is_empty = False
        for column in (label_column, client_column):
            if column is not None and column not in row.fields:
                raise InstructionDataError(
                    f"{row.place}: there is no column {column!r}; found {column_list(row.fields)}"
                )
        label = name_of(row.fields[label_column], label_column, row.place) if label_column is not None else ""
        client = row.file
        if client_column is not None:
            client = name_of(row.fields[client_column], client_column, row.place)
            if not client:
                raise InstructionDataError(
                    f"{row.place}: column {client_column!r} must name the owner of the row; got nothing "
                    f"({row.fields[client_column]!r}): fill the cell, or remove the row"
                )
        yield Row(reader.examples(row.fields, row.place), label, client)
    if is_empty:
        raise InstructionDataError(f"data.path: {path} holds no row; give it a file with data")
