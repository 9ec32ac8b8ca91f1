"""Turns any iterable of examples with an owner into a corpus whose clients are the owners.

    corpus, summary = load_owned_examples([{"owner": "ward 3", "prompt": "Pulse?", "completion": "72"}, ...], seed=0)

The iterable is read once and its texts go to a file, so that it may be longer than memory. Rows are merged, held out
and split as ``load_instructions`` does with ``partition="natural"``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from numbers import Integral
from typing import TypeAlias

from flexlora.data.corpus_file import ExampleFile
from flexlora.data.examples import Example, FederatedCorpus
from flexlora.data.found_values import abridged, column_list
from flexlora.data.instruction_files import Fields, InstructionDataError
from flexlora.data.instruction_schemas import ROLES, Convert, answers_of, schema_of, text_of
from flexlora.data.row_dealing import InstructionSummary, RowDealing, deal_rows
from flexlora.data.rows import Row, StoredRows

OWNER_KEY = "owner"
LABEL_KEY = "label"


@dataclass(frozen=True)
class OwnedExample:
    """One example and who has it.

    Attributes:
        owner: Becomes the id of a client.
        instruction: The request.
        answer: The accepted answer, or several.
        input: What the instruction is applied to; may be empty.
        label: Category, for tables and for holding out; may be empty.
        history: Earlier turns of a chat as (role, content) pairs.
    """

    owner: str | int
    instruction: str
    answer: str | Sequence[str]
    input: str = ""
    label: str | int | None = None
    history: Sequence[tuple[str, str]] = ()


# An OwnedExample; an owner and an example; a mapping with the key ``owner`` and the columns of an accepted schema.
OwnedRow: TypeAlias = OwnedExample | tuple[str | int, Example] | Mapping[str, object]


def load_owned_examples(
    examples: Iterable[OwnedRow],
    seed: int,
    *,
    num_clients: int | None = None,
    min_examples: int = 10,
    unseen_owners: Sequence[str | int] = (),
    unseen_labels: Sequence[str | int] = (),
    unseen_fraction: float = 0.0,
    file: ExampleFile | None = None,
) -> tuple[FederatedCorpus, InstructionSummary]:
    """Return one client per owner, 80/10/10 inside each, and what was left out.

    Args:
        examples: ``OwnedExample`` objects, ``(owner, Example)`` pairs, or mappings with the key ``owner``, optionally
            ``label``, and columns as files of instruction data have them (``messages``, ``prompt`` and
            ``completion``, or ``instruction`` and ``response``). The first mapping decides which columns are read.
        num_clients: Keep this many owners, drawn by the seed; None keeps all.
        min_examples: Owners with fewer rows are left out; 3 or more.
        unseen_owners: Owners that are no clients; each is one unseen task.
        unseen_labels: Labels that no client has; each is one unseen task.
        unseen_fraction: Share of the rows held out; one unseen task per label, if there are labels. At most one of
            the three ``unseen`` arguments may be given.
        file: Where examples are written; None takes a file that is deleted when the process ends.

    Raises:
        InstructionDataError: A row is broken (the message names row and field), an owner or label to hold out is
            unknown, or no row is left.
    """
    if sum(map(bool, (unseen_owners, unseen_labels, unseen_fraction))) > 1:
        raise InstructionDataError(
            "only one of unseen_owners, unseen_labels and unseen_fraction may be given; "
            f"got {list(unseen_owners)}, {list(unseen_labels)} and {unseen_fraction}"
        )
    dealing = RowDealing(
        partition="natural",
        num_clients=num_clients,
        min_examples=min_examples,
        unseen_owners=tuple(map(str, unseen_owners)),
        unseen_labels=tuple(map(str, unseen_labels)),
        unseen_fraction=unseen_fraction,
    )
    rows = StoredRows(within_clients=True)
    for row in rows_of(examples):
        rows.add(row)
    if rows.num_read == 0:
        raise InstructionDataError("data holds no row; pass examples with an owner")
    return deal_rows(rows, seed, dealing, file or ExampleFile(), "data")


def rows_of(examples: Iterable[OwnedRow]) -> Iterator[Row]:
    """Yield every example as a row; one without prompt or answer has no examples.

    Raises:
        InstructionDataError: A row is broken; the message names its number, from 1 on, and the field.
    """
    convert: Convert | None = None
    for number, item in enumerate(examples, start=1):
        place = f"data, row {number}"
        if isinstance(item, Mapping):
            if OWNER_KEY not in item:
                raise InstructionDataError(f"{place}: there is no {OWNER_KEY!r}; found {column_list(item)}")
            fields: Fields = {name: value for name, value in item.items() if name not in (OWNER_KEY, LABEL_KEY)}
            convert = convert or schema_of(fields, {}, place)
            found, owner, label = convert(fields, place), item[OWNER_KEY], item.get(LABEL_KEY)
        elif isinstance(item, OwnedExample):
            found, owner, label = _checked(item, "answer", place), item.owner, item.label
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Example):
            owner, example = item
            found, label = _checked(example, "outputs", place), None
        else:
            raise InstructionDataError(
                f"{place}: must be an OwnedExample, an (owner, Example) pair or a mapping with the key "
                f"{OWNER_KEY!r}; got {abridged(item)}"
            )
        client = _name(owner, OWNER_KEY, place)
        if not client:
            raise InstructionDataError(f"{place}: {OWNER_KEY!r} must name who has the row; got {abridged(owner)}")
        yield Row(found, _name(label, LABEL_KEY, place), client)


def _checked(item: OwnedExample | Example, answers_field: str, place: str) -> tuple[Example, ...]:
    """Return an example without outer white space, or none if it has no prompt or no answer."""
    fields = {name: getattr(item, name) for name in ("instruction", "input", answers_field)}
    instruction, text_input = text_of(fields, "instruction", place), text_of(fields, "input", place)
    answers = answers_of(fields, answers_field, place)
    if not answers or not (instruction or text_input):
        return ()
    return (Example(instruction, text_input, answers, _turns(item.history, place)),)


def _turns(history: object, place: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise InstructionDataError(f"{place}: 'history' must be (role, content) pairs; got {abridged(history)}")
    turns = []
    for turn in history:
        match turn:
            case (str(role), str(content)) if role in ROLES:
                turns.append((role, content.strip()))
            case _:
                raise InstructionDataError(
                    f"{place}: 'history' must be pairs of a role ({', '.join(ROLES)}) and a text; got {abridged(turn)}"
                )
    return tuple(turns)


def _name(value: object, field: str, place: str) -> str:
    """Return an owner or a label as text, empty for None, not-a-number and an empty text."""
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | Integral):
        raise InstructionDataError(f"{place}: {field!r} must be a text or a whole number; got {abridged(value)}")
    return str(value)
