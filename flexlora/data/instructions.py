"""Any instruction data: rows of a file, a folder or a hub data set, dealt to clients.

corpus, summary = load_instructions("dolly.jsonl", seed=0, partition="dirichlet", label_column="category",
                                    num_clients=200, unseen_labels=("closed_qa",))
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from flexlora.data.examples import Example, ExampleSplits, FederatedCorpus
from flexlora.data.partition import Indices, by_id, dirichlet, iid, train_validation_test
from flexlora.errors import FlexLoraError
from flexlora.federation.streams import stream

PartitionName = Literal["natural", "dirichlet", "iid"]

DEFAULT_NUM_CLIENTS = 100
HELD_OUT = "held-out"
SCHEMAS = (
    "messages (a list of role and content)",
    "prompt and completion",
    "instruction, response or output, and optionally context or input",
)
COLUMN_NAMES = ("messages", "prompt", "completion", "instruction", "context", "input", "response", "output")


class InstructionDataError(FlexLoraError, ValueError):
    """The data cannot be read or dealt as asked; the message names the file and the row."""


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        examples: One, or one per answer of a conversation; always in one part together.
        label: Value of the label column, empty without one.
        client: Value of the client column, empty without one.
    """

    examples: tuple[Example, ...]
    label: str = ""
    client: str = ""


@dataclass(frozen=True)
class InstructionSummary:
    """What became of the rows.

    Attributes:
        num_rows: Rows read.
        num_clients: Clients made.
        num_unseen: Unseen tasks made.
        num_empty: Rows left out because their prompt or their answer is empty.
        num_repeated: Rows merged into another one with the same prompt.
        num_too_small: Natural clients left out for having too few rows.
        num_not_drawn: Natural clients left out because ``num_clients`` was reached.
        num_leaked: Examples taken out of validation and test parts because some client trains on the same prompt.
        num_train: Training examples of all clients.
        num_validation: Validation examples of all clients.
        num_test: Test examples of all clients.
        num_unseen_test: Examples of unseen tasks.
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

    Raises:
        InstructionDataError: The data cannot be read, a row is broken, or a column or label is unknown.
        PartitionError: There are too few rows for so many clients.
    """
    _check_request(partition, label_column, client_column, min_examples, unseen_labels, unseen_fraction)
    read = list(read_instructions(path, columns or {}, label_column, client_column))
    filled = [row for row in read if row.examples]
    rows = _merge_repeated(filled, within_clients=partition == "natural")
    trained, unseen = _hold_out(rows, unseen_labels, unseen_fraction, seed)
    if not trained:
        raise InstructionDataError(f"{path}: no row is left for clients; hold out fewer labels or a smaller fraction")
    parts, num_too_small, num_not_drawn = _deal(trained, partition, num_clients, dirichlet_alpha, min_examples, seed)
    clients = {name: _split(name, [trained[index] for index in part], seed) for name, part in parts.items()}
    corpus, num_leaked = _drop_trained(FederatedCorpus(clients, unseen))
    return corpus, InstructionSummary(
        num_rows=len(read),
        num_clients=len(corpus.clients),
        num_unseen=len(corpus.unseen),
        num_empty=len(read) - len(filled),
        num_repeated=len(filled) - len(rows),
        num_too_small=num_too_small,
        num_not_drawn=num_not_drawn,
        num_leaked=num_leaked,
        num_train=sum(len(splits.train) for splits in corpus.clients.values()),
        num_validation=sum(len(splits.validation) for splits in corpus.clients.values()),
        num_test=sum(len(splits.test) for splits in corpus.clients.values()),
        num_unseen_test=sum(len(splits.test) for splits in corpus.unseen.values()),
    )


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
    for place, fields in _read_rows(path):
        if convert is None:
            convert = _schema_of(fields, columns, place)
        for column in (label_column, client_column):
            if column is not None and column not in fields:
                raise InstructionDataError(f"{place}: there is no column {column!r}; found {_listed(fields)}")
        label = fields[label_column] if label_column is not None else None
        client = fields[client_column] if client_column is not None else ""
        if client is None:
            raise InstructionDataError(f"{place}: column {client_column!r} must name the owner of the row; got nothing")
        yield Row(convert(_renamed(fields, columns, place), place), "" if label is None else str(label), str(client))
    if convert is None:
        raise InstructionDataError(f"data.path: {path} holds no row; give it a file with data")


# Reading ------------------------------------------------------------------------------------------------------------

Fields = Mapping[str, object]


def _read_rows(path: Path | str) -> Iterator[tuple[str, Fields]]:
    """Yield the place of every row, for messages, and its columns."""
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
        raise InstructionDataError(f"{place}: a row must be a JSON object of columns; got {_abridged(row)}")
    return row


# Schemas ------------------------------------------------------------------------------------------------------------

Convert = Callable[[Fields, str], tuple[Example, ...]]


def _schema_of(fields: Fields, columns: Mapping[str, str], place: str) -> Convert:
    """Return the conversion for the schema of the first row; columns that were renamed on purpose decide."""
    unknown = sorted(set(columns) - set(COLUMN_NAMES))
    if unknown:
        raise InstructionDataError(f"data.columns must rename to {', '.join(COLUMN_NAMES)}; got {', '.join(unknown)}")
    found = set(_renamed(fields, columns, place))
    fitting: list[tuple[set[str], Convert]] = []
    if "messages" in found:
        fitting.append(({"messages"}, _from_messages))
    if found >= {"prompt", "completion"}:
        fitting.append(({"prompt", "completion"}, _from_completion))
    if "instruction" in found and found & {"response", "output"}:
        fitting.append(({"instruction", "context", "input", "response", "output"}, _from_instruction))
    for names, convert in fitting:
        if not columns or names & set(columns):
            return convert
    if fitting:
        return fitting[0][1]
    raise InstructionDataError(
        f"{place}: the columns must be {'; or '.join(SCHEMAS)}; found {_listed(fields)}. "
        "Set data.columns, for example {instruction: question, response: answer}"
    )


def _renamed(fields: Fields, columns: Mapping[str, str], place: str) -> Fields:
    if not columns:
        return fields
    missing = sorted(set(columns.values()) - set(fields))
    if missing:
        raise InstructionDataError(
            f"{place}: data.columns names the column {missing[0]!r}, which is not there; found {_listed(fields)}"
        )
    taken = set(columns.values())
    kept = {name: value for name, value in fields.items() if name not in taken}
    return kept | {ours: fields[theirs] for ours, theirs in columns.items()}


def _from_instruction(fields: Fields, place: str) -> tuple[Example, ...]:
    instruction = _text(fields, "instruction", place)
    text_input = _text(fields, "context" if "context" in fields else "input", place, optional=True)
    answers = _answers(fields, "output" if "output" in fields and "response" not in fields else "response", place)
    return (Example(instruction, text_input, answers),) if answers and (instruction or text_input) else ()


def _from_completion(fields: Fields, place: str) -> tuple[Example, ...]:
    prompt, answers = _text(fields, "prompt", place), _answers(fields, "completion", place)
    return (Example(prompt, "", answers),) if answers and prompt else ()


def _from_messages(fields: Fields, place: str) -> tuple[Example, ...]:
    """Return one example per answer of the assistant, with everything before its question as history."""
    messages = fields.get("messages")
    if not isinstance(messages, list):
        raise InstructionDataError(f"{place}: messages must be a list of turns; got {_abridged(messages)}")
    turns: list[tuple[str, str]] = []
    examples = []
    for number, message in enumerate(messages, start=1):
        turn = f"{place}, turn {number}"
        if not isinstance(message, dict):
            raise InstructionDataError(f"{turn}: must be an object with role and content; got {_abridged(message)}")
        role, content = message.get("role"), _text(message, "content", turn)
        if role not in ("system", "user", "assistant"):
            raise InstructionDataError(f"{turn}: role must be system, user or assistant; got {_abridged(role)}")
        if role == "assistant" and content and turns:
            asked_by, question = turns[-1]
            if asked_by != "user":
                raise InstructionDataError(
                    f"{turn}: an answer of the assistant must follow a turn of the user; got one after {asked_by}"
                )
            if question:
                examples.append(Example(question, "", (content,), history=tuple(turns[:-1])))
        turns.append((str(role), content))
    return tuple(examples)


def _text(fields: Fields, name: str, place: str, *, optional: bool = False) -> str:
    if name not in fields and not optional:
        raise InstructionDataError(f"{place}: there is no {name!r}; found {_listed(fields)}")
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InstructionDataError(f"{place}: {name!r} must be a text; got {_abridged(value)}")
    return (value or "").strip()


def _answers(fields: Fields, name: str, place: str) -> tuple[str, ...]:
    """Return the accepted answers that are not empty; a list in the data is several of them."""
    value = fields.get(name)
    if not isinstance(value, list):
        text = _text(fields, name, place)
        return (text,) if text else ()
    if not all(isinstance(text, str) for text in value):
        raise InstructionDataError(f"{place}: {name!r} must be a text or a list of texts; got {_abridged(value)}")
    return tuple(dict.fromkeys(text.strip() for text in value if text.strip()))


def _listed(fields: Fields) -> str:
    return "the columns " + ", ".join(map(str, fields)) if fields else "no columns"


def _abridged(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


# Dealing ------------------------------------------------------------------------------------------------------------


def _check_request(
    partition: str,
    label_column: str | None,
    client_column: str | None,
    min_examples: int,
    unseen_labels: Sequence[str],
    unseen_fraction: float,
) -> None:
    if partition not in ("natural", "dirichlet", "iid"):
        raise InstructionDataError(f"data.partition must be natural, dirichlet or iid; got {partition!r}")
    if partition == "natural" and client_column is None:
        raise InstructionDataError("data.partition=natural needs the owner of every row; set data.client_column")
    if (partition == "dirichlet" or unseen_labels) and label_column is None:
        wanted = "data.partition=dirichlet" if partition == "dirichlet" else "data.unseen_labels"
        raise InstructionDataError(f"{wanted} needs a label for every row; set data.label_column")
    if min_examples < 3:
        raise InstructionDataError(
            f"data.min_examples must be 3 or more, one for each of training, validation and test; got {min_examples}"
        )
    if not 0 <= unseen_fraction < 1:
        raise InstructionDataError(f"data.unseen_fraction must be at least 0 and below 1; got {unseen_fraction}")


def _merge_repeated(rows: Sequence[Row], *, within_clients: bool) -> list[Row]:
    """Return the rows with those of the same prompts made one that accepts the answers of all.

    The first of them gives label and client. Natural clients keep what is theirs: rows of two clients stay apart.
    """
    merged: dict[object, Row] = {}
    for row in rows:
        prompts = tuple((example.history, example.instruction, example.input) for example in row.examples)
        key = (row.client if within_clients else "", prompts)
        known = merged.get(key)
        if known is None:
            merged[key] = row
        else:
            examples = tuple(
                replace(ours, outputs=tuple(dict.fromkeys(ours.outputs + theirs.outputs)))
                for ours, theirs in zip(known.examples, row.examples, strict=True)
            )
            merged[key] = replace(known, examples=examples)
    return list(merged.values())


def _hold_out(
    rows: Sequence[Row], unseen_labels: Sequence[str], unseen_fraction: float, seed: int
) -> tuple[list[Row], dict[str, ExampleSplits]]:
    """Return the rows of clients, and the unseen tasks made of all others."""
    if unseen_labels:
        labels = {row.label for row in rows}
        unknown = sorted(set(unseen_labels) - labels)
        if unknown:
            near = difflib.get_close_matches(unknown[0], sorted(labels), n=3, cutoff=0.4) or sorted(labels)[:10]
            raise InstructionDataError(
                f"data.unseen_labels must name labels of the data; {unknown[0]!r} is none, near it: {', '.join(near)}"
            )
        held_out = {index for index, row in enumerate(rows) if row.label in unseen_labels}
    else:
        order = stream(seed, "held-out-rows").permutation(len(rows))
        held_out = set(order[: max(round(unseen_fraction * len(rows)), int(unseen_fraction > 0))].tolist())
    tasks: dict[str, list[Row]] = {}
    for index in stream(seed, "unseen-order").permutation(len(rows)).tolist():
        if index in held_out:
            label = rows[index].label
            name = label if unseen_labels else f"{HELD_OUT}-{label}" if label else HELD_OUT
            tasks.setdefault(name, []).append(rows[index])
    unseen = {name: ExampleSplits((), (), _flat(held), held[0].label) for name, held in sorted(tasks.items())}
    return [row for index, row in enumerate(rows) if index not in held_out], unseen


def _deal(
    rows: Sequence[Row],
    partition: PartitionName,
    num_clients: int | None,
    dirichlet_alpha: float,
    min_examples: int,
    seed: int,
) -> tuple[dict[str, Indices], int, int]:
    """Return client id -> its rows, and how many natural clients were too small or not drawn."""
    if partition == "natural":
        return _deal_natural(rows, num_clients, min_examples, seed)
    rng = stream(seed, "partition")
    size = DEFAULT_NUM_CLIENTS if num_clients is None else num_clients
    if partition == "iid":
        parts = iid(len(rows), size, rng, min_examples)
    else:
        parts = dirichlet([row.label for row in rows], size, dirichlet_alpha, rng, min_examples)
    width = max(len(str(size - 1)), 4)
    return {f"client-{number:0{width}d}": part for number, part in enumerate(parts)}, 0, 0


def _deal_natural(
    rows: Sequence[Row], num_clients: int | None, min_examples: int, seed: int
) -> tuple[dict[str, Indices], int, int]:
    owned = by_id([row.client for row in rows])
    large = {name: part for name, part in owned.items() if len(part) >= min_examples}
    wanted = len(large) if num_clients is None else num_clients
    if not 1 <= wanted <= len(large):
        raise InstructionDataError(
            f"data.num_clients must be in 1..{len(large)}, the natural clients with data.min_examples={min_examples} "
            f"rows or more (of {len(owned)}); got {wanted}"
        )
    candidates = list(large)
    order = stream(seed, "natural-clients").permutation(len(candidates))[:wanted]
    names = sorted(candidates[index] for index in order)
    return {name: large[name] for name in names}, len(owned) - len(large), len(large) - wanted


def _split(client_id: str, rows: Sequence[Row], seed: int) -> ExampleSplits:
    parts = train_validation_test(len(rows), stream(seed, "row-split", client_id))
    train, validation, test = (_flat([rows[index] for index in part]) for part in parts)
    labels = {row.label for row in rows}
    return ExampleSplits(train, validation, test, labels.pop() if len(labels) == 1 else "")


def _flat(rows: Iterable[Row]) -> tuple[Example, ...]:
    return tuple(example for row in rows for example in row.examples)


def _drop_trained(corpus: FederatedCorpus) -> tuple[FederatedCorpus, int]:
    """Return the corpus without validation and test examples whose prompt some client trains on, and their number."""
    trained = {_prompt(example) for splits in corpus.clients.values() for example in splits.train}
    num_dropped = 0

    def cleaned(splits: ExampleSplits) -> ExampleSplits:
        nonlocal num_dropped
        validation = tuple(example for example in splits.validation if _prompt(example) not in trained)
        test = tuple(example for example in splits.test if _prompt(example) not in trained)
        num_dropped += len(splits.validation) + len(splits.test) - len(validation) - len(test)
        return replace(splits, validation=validation, test=test)

    clients = {name: cleaned(splits) for name, splits in corpus.clients.items()}
    unseen = {name: cleaned(splits) for name, splits in corpus.unseen.items()}
    return replace(corpus, clients=clients, unseen=unseen), num_dropped


def _prompt(example: Example) -> tuple[tuple[tuple[str, str], ...], str, str]:
    return example.history, example.instruction, example.input
