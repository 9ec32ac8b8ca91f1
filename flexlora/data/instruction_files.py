"""Reads rows of columns from files of several formats, folders of them and hub data sets.

Every row comes with its place (file and line), which error messages name.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from flexlora.data.cells import Fields
from flexlora.data.data_files import COMPRESSIONS, data_files, kind_of, owner_of
from flexlora.data.data_notes import DataNotes
from flexlora.data.data_streams import opened_bytes, opened_text
from flexlora.data.found_values import abridged
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.surrogates import whole_value
from flexlora.foreign import ForeignError, read_json

# csv reads cells of up to 131,072 characters unless it is told otherwise; this is the most on every platform.
_MOST_CELL_CHARACTERS = 2**31 - 1


@dataclass(frozen=True)
class FoundRow:
    """One row of a data set.

    Attributes:
        place: File and line, for messages.
        fields: Its columns.
        file: Name of its file without the endings, below the folder that was read; empty for hub data sets.
    """

    place: str
    fields: Fields
    file: str = ""


def read_rows(path: Path | str, notes: DataNotes | None = None) -> Iterator[FoundRow]:
    """Yield every row of a data set.

    Args:
        path: A .json, .jsonl, .csv, .tsv or .parquet file, perhaps compressed, a folder of them or one that
            ``save_to_disk`` of the datasets library wrote, or a hub id (its ``train`` split).
        notes: Told which files of a folder are not read, and which texts are repaired.

    Raises:
        InstructionDataError: There is no such file or data set, or it is broken.
    """
    notes = DataNotes() if notes is None else notes
    for place, fields, file in _unrepaired(path, notes):
        whole = whole_value(fields)
        notes.num_repaired += whole is not fields
        yield FoundRow(place, whole, file)


def read_fields(path: Path | str, notes: DataNotes | None = None) -> Iterator[tuple[str, Fields]]:
    """Yield the place of every row, for messages, and its columns; see ``read_rows``."""
    for row in read_rows(path, notes):
        yield row.place, row.fields


def _unrepaired(path: Path | str, notes: DataNotes) -> Iterator[tuple[str, Fields, str]]:
    local = Path(path).expanduser()
    known = f"{', '.join(READERS)}, or one of these with {', '.join(COMPRESSIONS)} behind it"
    if local.is_file():
        if not _is_readable(local):
            raise InstructionDataError(f"data.path: files must end in {known}; got {local}")
        yield from ((place, fields, kind_of(local).stem) for place, fields in _reader(local)(local))
    elif local.is_dir():
        files = data_files(local, READERS, notes)
        if not files:
            raise InstructionDataError(f"data.path: the folder {local} must hold files that end in {known}")
        for file in files:
            owner, is_empty = owner_of(file, local), True
            for place, fields in _reader(file)(file):
                is_empty = False
                yield place, fields, owner
            if is_empty:
                notes.skipped["/".join(file.relative_to(local).parts)] = "no rows"
    elif _is_readable(local) or str(path).count("/") > 1 or str(path).startswith(("/", ".", "~")):
        raise InstructionDataError(f"data.path: there is no file or folder {path}; a hub id looks like org/name")
    else:
        yield from ((place, fields, "") for place, fields in _read_hub(str(path)))


def _is_readable(file: Path) -> bool:
    return kind_of(file).ending in READERS


def _reader(file: Path) -> "_Reader":
    return READERS[kind_of(file).ending]


def _read_json(file: Path) -> Iterator[tuple[str, Fields]]:
    """Yield the rows of one list, or of one object a line, whichever of the two the file holds."""
    with opened_text(file, newline="\n") as text:
        begin: list[str] = []
        for line in text:
            begin.append(line)
            if line.strip():
                break
        lines = chain(begin, text)
        if not (begin and begin[-1].lstrip().startswith("[")):
            yield from _lines(file, lines)
            return
        rows = _parsed("".join(lines), f"{file} must be JSON")
    assert isinstance(rows, list), "it starts as a list does"
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", _as_fields(row, f"{file}, row {number}")


def _lines(file: Path, lines: Iterable[str]) -> Iterator[tuple[str, Fields]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{file}, line {number}"
            rule = f"{place}: must be one JSON object per line, or the whole file one JSON list"
            yield place, _as_fields(_parsed(line, rule), place)


def _parsed(text: str, rule: str) -> object:
    try:
        return read_json(text, rule, unique_keys=True)
    except ForeignError as error:
        raise InstructionDataError(f"{rule} ({error.reason}); repair the file") from error


def _read_csv(file: Path) -> Iterator[tuple[str, Fields]]:
    return _read_table(file, ",")


def _read_tsv(file: Path) -> Iterator[tuple[str, Fields]]:
    return _read_table(file, "\t")


def _read_table(file: Path, delimiter: str) -> Iterator[tuple[str, Fields]]:
    csv.field_size_limit(_MOST_CELL_CHARACTERS)
    with opened_text(file) as text:
        reader = csv.reader(text, strict=True, delimiter=delimiter)
        header: list[str] | None = None
        try:
            for values in filter(None, reader):
                place = f"{file}, line {reader.line_num}"
                if header is None:
                    header = values
                    _check_unique(header, place)
                    continue
                if len(values) != len(header):
                    raise InstructionDataError(
                        f"{place}: must have the {len(header)} columns of the header; got {len(values)}: "
                        "put values with commas in double quotes"
                    )
                yield place, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise InstructionDataError(f"{file}, line {reader.line_num}: not valid CSV ({error}); repair it") from error


def _check_unique(header: Iterable[str], place: str) -> None:
    """Raise if two columns have one name; columns without a name, as of row numbers, may be several."""
    names = [name for name in header if name.strip()]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise InstructionDataError(
            f"{place}: every column must have a name of its own; {repeated[0]!r} occurs {names.count(repeated[0])} "
            "times: rename or remove one"
        )


def _read_parquet(file: Path) -> Iterator[tuple[str, Fields]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InstructionDataError(f"{file}: parquet files need pip install 'flexlora[hub]'") from error

    def batches() -> Iterator[Any]:
        """Yield the table in parts."""
        table = parquet.ParquetFile(_source(file))
        _check_unique(table.schema_arrow.names, str(file))
        yield from table.iter_batches()

    yield from _arrow_rows(file, batches(), "a parquet file")


def _read_arrow(file: Path) -> Iterator[tuple[str, Fields]]:
    """Yield the rows of a file as ``save_to_disk`` of the datasets library writes them."""
    try:
        import pyarrow
    except ImportError as error:
        raise InstructionDataError(f"{file}: arrow files need pip install 'flexlora[hub]'") from error

    def batches() -> Iterator[Any]:
        """Yield the table in parts."""
        source = pyarrow.input_stream(_source(file))
        stream = pyarrow.ipc.open_stream(source)
        _check_unique(stream.schema.names, str(file))
        yield from stream

    yield from _arrow_rows(file, batches(), "an arrow file as save_to_disk writes it")


def _source(file: Path) -> str | io.BytesIO:
    with opened_bytes(file) as content:
        return io.BytesIO(content.read()) if kind_of(file).compression else str(file)


def _arrow_rows(file: Path, batches: Iterator[Any], what: str) -> Iterator[tuple[str, Fields]]:
    numbers = count(1)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except InstructionDataError:
            raise
        except (OSError, ValueError) as error:  # What pyarrow's own errors derive from.
            raise InstructionDataError(f"{file} must be {what} ({error}); write it again") from error
        if batch is None:
            return
        yield from ((f"{file}, row {next(numbers)}", row) for row in rows)


def _read_hub(name: str) -> Iterator[tuple[str, Fields]]:
    try:
        import datasets
    except ImportError as error:
        raise InstructionDataError(
            f"data.path: {name} is no local file, and hub data sets need pip install 'flexlora[hub]'"
        ) from error
    try:
        rows: Iterable[Fields] = datasets.load_dataset(name, split="train")  # pyright: ignore[reportAssignmentType]
    except Exception as error:  # The network, the hub and loading scripts fail in too many ways to list.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InstructionDataError(
            f"data.path: {name} is no local file and could not be loaded as a hub data set ({reason}); "
            "check name and network, or download it and give the path of the file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


_Reader = Callable[[Path], Iterator[tuple[str, Fields]]]

READERS: Mapping[str, _Reader] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


def _as_fields(row: object, place: str) -> Fields:
    if not isinstance(row, dict):
        raise InstructionDataError(f"{place}: a row must be a JSON object of columns; got {abridged(row)}")
    return row
