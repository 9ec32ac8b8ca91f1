"""Reads rows of columns from files of several formats, folders of them and hub data sets.

Every row comes with its place (file and line), which error messages name.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from flexlora.data.found_values import abridged
from flexlora.errors import FlexLoraError

Fields = Mapping[str, object]


class InstructionDataError(FlexLoraError, ValueError):
    """The data cannot be read or dealt as asked; the message names the file and the row."""


def read_fields(path: Path | str) -> Iterator[tuple[str, Fields]]:
    """Yield the place of every row, for messages, and its columns.

    Args:
        path: A .json, .jsonl, .csv or .parquet file, a folder of them, or a hub id (its ``train`` split).

    Raises:
        InstructionDataError: There is no such file or data set, or it is broken.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in READERS:
            raise InstructionDataError(f"data.path: files must end in {', '.join(READERS)}; got {local}")
        yield from READERS[local.suffix](local)
    elif local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.suffix in READERS and file.is_file())
        if not files:
            raise InstructionDataError(
                f"data.path: the folder {local} must hold files that end in {', '.join(READERS)}"
            )
        yield from chain.from_iterable(READERS[file.suffix](file) for file in files)
    elif local.suffix in READERS or str(path).count("/") > 1 or str(path).startswith(("/", ".", "~")):
        raise InstructionDataError(f"data.path: there is no file or folder {path}; a hub id looks like org/name")
    else:
        yield from _read_hub(str(path))


def _read_json(file: Path) -> Iterator[tuple[str, Fields]]:
    text = _text_of(file)
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(file)  # Many files of JSON lines are called .json.
        return
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise InstructionDataError(f"{file} must be JSON ({error}); repair the file") from error
    for number, row in enumerate(rows, start=1):
        yield f"{file}, row {number}", _as_fields(row, f"{file}, row {number}")


def _read_json_lines(file: Path) -> Iterator[tuple[str, Fields]]:
    for number, line in enumerate(_text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InstructionDataError(
                f"{place}: must be one JSON object per line, or the whole file one JSON list ({error}); repair the file"
            ) from error
        yield place, _as_fields(row, place)


def _read_csv(file: Path) -> Iterator[tuple[str, Fields]]:
    reader = csv.reader(io.StringIO(_text_of(file), newline=""), strict=True)
    header: list[str] | None = None
    try:
        for values in reader:
            place = f"{file}, line {reader.line_num}"
            if header is None:
                header = values
            elif values:
                if len(values) != len(header):
                    raise InstructionDataError(
                        f"{place}: must have the {len(header)} columns of the header; got {len(values)}: "
                        "put values with commas in double quotes"
                    )
                yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise InstructionDataError(f"{file}, line {reader.line_num}: not valid CSV ({error}); repair it") from error


def _read_parquet(file: Path) -> Iterator[tuple[str, Fields]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InstructionDataError(f"{file}: parquet files need pip install 'flexlora[hub]'") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (OSError, ValueError) as error:  # What pyarrow's own errors derive from.
        raise InstructionDataError(f"{file} must be a parquet file ({error}); write it again") from error


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InstructionDataError(
            f"data.path: {name} is no local file and could not be loaded as a hub data set ({reason}); "
            "check name and network, or download it and give the path of the file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, Fields]]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InstructionDataError(f"{file} must be a readable file in UTF-8 ({error}); save it in UTF-8") from error


def _as_fields(row: object, place: str) -> Fields:
    if not isinstance(row, dict):
        raise InstructionDataError(f"{place}: a row must be a JSON object of columns; got {abridged(row)}")
    return row
