"""Loads instruction data: rows of a file, a folder or a hub data set, dealt to clients.

corpus, summary = load_instructions("dolly.jsonl", seed=0, partition="dirichlet", label_column="category",
                                    num_clients=200, unseen_labels=("closed_qa",))
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flexlora.data.corpus_file import ExampleFile
from flexlora.data.examples import FederatedCorpus
from flexlora.data.found_values import column_list
from flexlora.data.instruction_files import InstructionDataError, read_fields
from flexlora.data.instruction_schemas import renamed, schema_of
from flexlora.data.row_dealing import InstructionSummary, PartitionName, RowDealing, deal_rows
from flexlora.data.rows import Row, StoredRows


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
    columns: Mapping[str, str] | None = None,
    unseen_labels: Sequence[str] = (),
    unseen_fraction: float = 0.0,
    file: ExampleFile | None = None,
) -> tuple[FederatedCorpus, InstructionSummary]:
    """Return the rows dealt to clients, 80/10/10 inside each, and what was left out.

    Args:
        path: A .json, .jsonl, .csv or .parquet file, a folder of them, or a hub id (its ``train`` split).
        partition: ``natural`` by ``client_column``, ``dirichlet`` over ``label_column``, or ``iid``.
        num_clients: None takes all natural clients, else 100.
        dirichlet_alpha: Concentration; small is uneven.
        min_examples: Fewest rows of a client, 3 or more. Natural clients with fewer are left out; the other
            partitions guarantee it or fail.
        label_column: Column of labels; also the category of clients with a single label and of unseen tasks.
        client_column: Column of the owners of rows.
        columns: Our column name -> the one in the data, for example ``{"instruction": "question"}``.
        unseen_labels: Labels that no client has; each is one unseen task.
        unseen_fraction: Without unseen labels, the share of rows held out; one unseen task per label, if there are
            labels.
        file: Where examples are written; None takes a file that is deleted when the process ends.

    Raises:
        InstructionDataError: The data cannot be read, a row is broken, or a column or label is unknown.
        PartitionError: There are too few rows for so many clients.
    """
    if partition == "natural" and client_column is None:
        raise InstructionDataError("data.partition=natural needs the owner of every row; set data.client_column")
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
    rows = StoredRows(within_clients=partition == "natural")
    for row in read_instructions(path, columns or {}, label_column, client_column):
        rows.add(row)
    return deal_rows(rows, seed, dealing, file or ExampleFile(), str(path))


def read_instructions(
    path: Path | str,
    columns: Mapping[str, str] | None = None,
    label_column: str | None = None,
    client_column: str | None = None,
) -> Iterator[Row]:
    """Yield every row of the data; one without prompt or answer has no examples.

    The first row decides which of the accepted schemas the data has. See ``load_instructions`` for the arguments.

    Raises:
        InstructionDataError: The data cannot be read, fit no schema, or a row is broken.
    """
    columns = columns or {}
    convert = None
    for place, fields in read_fields(path):
        if convert is None:
            convert = schema_of(fields, columns, place)
        for column in (label_column, client_column):
            if column is not None and column not in fields:
                raise InstructionDataError(f"{place}: there is no column {column!r}; found {column_list(fields)}")
        label = fields[label_column] if label_column is not None else None
        client = fields[client_column] if client_column is not None else ""
        if client is None:
            raise InstructionDataError(f"{place}: column {client_column!r} must name the owner of the row; got nothing")
        yield Row(convert(renamed(fields, columns, place), place), "" if label is None else str(label), str(client))
    if convert is None:
        raise InstructionDataError(f"data.path: {path} holds no row; give it a file with data")
