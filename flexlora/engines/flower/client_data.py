"""Reads the data of one client, split and tokenised as a simulation of the same run would do it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flexlora.data.corpus_file import ExampleFile
from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_schemas import RowReader
from flexlora.data.instructions import read_instructions
from flexlora.data.row_dealing import RowDealing, deal_rows
from flexlora.data.rows import StoredRows
from flexlora.engines.flower.run_settings import RunSettings

# Fewer rows cannot be split into parts for training, validation and test.
_FEWEST_ROWS = 3


def training_examples(path: Path | str, client_id: str, run: RunSettings) -> Sequence[Example]:
    """Return the training part of a client's own file or folder.

    It is 80 % of the rows, drawn by the seed of the run and the client's name; all rows of one prompt stay together.

    Args:
        path: A file or folder of rows, as ``read_rows`` takes it; never a hub id.
        client_id: The client's name.
        run: Says which columns hold what, and which labels are left out.

    Raises:
        InstructionDataError: If there is no such file, it cannot be read, or holds too few rows.
    """
    local = Path(path).expanduser()
    if not local.exists():
        raise InstructionDataError(f"the data of a client must be a file or folder; there is none at {local}")
    taken = () if run.label_column is None else (run.label_column,)
    reader = RowReader(DataNotes(), run.columns, run.loss_on == "all", taken)
    rows = StoredRows(within_clients=True)
    for row in read_instructions(local, reader, run.label_column):
        if row.label not in run.unseen_labels or run.label_column is None:
            rows.add(replace(row, client=client_id))
    if len(rows) < _FEWEST_ROWS:
        raise InstructionDataError(
            f"a client needs at least {_FEWEST_ROWS} rows with a prompt and an answer; {local} has {len(rows)}"
        )
    dealing = RowDealing(partition="natural", min_examples=_FEWEST_ROWS)
    corpus, _ = deal_rows(rows, run.seed, dealing, ExampleFile(), str(local))
    return corpus.clients[client_id].train
