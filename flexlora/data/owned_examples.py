"""Turns any iterable of examples with an owner into a corpus whose clients are the owners.

    corpus, summary = load_owned_examples([{"owner": "ward 3", "prompt": "Pulse?", "completion": "72"}, ...], seed=0)

The iterable is read once and its texts go to a file, so that it may be longer than memory. Rows are merged, held out
and split as ``load_instructions`` does with ``partition="natural"``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeAlias

from flexlora.data.cells import Fields, answers_of, name_of, text_of
from flexlora.data.conversations import ROLES
from flexlora.data.corpus_file import ExampleFile
from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example, FederatedCorpus, Turn
from flexlora.data.found_values import abridged, column_list
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.instruction_schemas import RowReader
from flexlora.data.row_dealing import InstructionSummary, RowDealing, deal_rows
from flexlora.data.rows import Row, StoredRows
from flexlora.data.surrogates import whole_value

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
    trains_all: bool = False,
    file: ExampleFile | None = None,
) -> tuple[FederatedCorpus, InstructionSummary]:
    """Return one client per owner, 80/10/10 inside each, and what was left out.

    Args:
        examples: ``OwnedExample`` objects, ``(owner, Example)`` pairs, or mappings with the key ``owner``, optionally
            ``label``, and columns as files of instruction data have them (``messages``, ``prompt`` and
            ``completion``, or ``instruction`` and ``response``).
        num_clients: Keep this many owners, drawn by the seed; None keeps all.
        min_examples: Owners with fewer rows are left out; 3 or more.
        unseen_owners: Owners that are no clients; each is one unseen task.
        unseen_labels: Labels that no client has; each is one unseen task.
        unseen_fraction: Share of the rows held out; one unseen task per label, if there are labels. At most one of
            the three ``unseen`` arguments may be given.
        trains_all: Whether the loss looks at all tokens, which mappings of nothing but a ``text`` need.
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
    rows, notes = StoredRows(within_clients=True), DataNotes()
    for row in rows_of(examples, RowReader(notes, {}, trains_all)):
        rows.add(row)
    if rows.num_read == 0:
        raise InstructionDataError("data holds no row; pass examples with an owner")
    corpus, summary = deal_rows(rows, seed, dealing, file or ExampleFile(), "data")
    return corpus, replace(summary, notes=(*notes.sentences(), *summary.notes))


def rows_of(examples: Iterable[OwnedRow], reader: RowReader | None = None) -> Iterator[Row]:
    """Yield every example as a row; one without prompt or answer has no examples.

    Args:
        examples: As in ``load_owned_examples``.
        reader: Makes examples of mappings, and is told what is not used.

    Raises:
        InstructionDataError: A row is broken; the message names its number, from 1 on, and the field.
    """
    reader = RowReader(DataNotes(), {}) if reader is None else reader
    for number, given in enumerate(examples, start=1):
        place = f"data, row {number}"
        item = _whole(given)
        reader.notes.num_repaired += item is not given
        if isinstance(item, Mapping):
            if OWNER_KEY not in item:
                raise InstructionDataError(f"{place}: there is no {OWNER_KEY!r}; found {column_list(item)}")
            columns: Fields = {name: value for name, value in item.items() if name not in (OWNER_KEY, LABEL_KEY)}
            found, owner, label = reader.examples(columns, place), item[OWNER_KEY], item.get(LABEL_KEY)
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
        client = name_of(owner, OWNER_KEY, place)
        if not client:
            raise InstructionDataError(f"{place}: {OWNER_KEY!r} must name who has the row; got {abridged(owner)}")
        yield Row(found, name_of(label, LABEL_KEY, place), client)


def _whole(item: OwnedRow) -> OwnedRow:
    """Return an example with all its texts whole; the very same object where nothing had to be replaced."""
    if isinstance(item, tuple) and len(item) == 2:
        owner, example = whole_value(item[0]), _whole(item[1])  # pyright: ignore[reportArgumentType]
        return item if owner is item[0] and example is item[1] else (owner, example)  # pyright: ignore[reportReturnType]
    if is_dataclass(item):
        values = {own.name: getattr(item, own.name) for own in fields(item)}
        changed = {name: new for name, value in values.items() if (new := whole_value(value)) is not value}
        return replace(item, **changed) if changed else item
    return whole_value(item)


def _checked(item: OwnedExample | Example, answers_field: str, place: str) -> tuple[Example, ...]:
    """Return an example as it stands, or none if it has no prompt or no answer."""
    values = {name: getattr(item, name) for name in ("instruction", "input", answers_field)}
    instruction, text_input = text_of(values, "instruction", place), text_of(values, "input", place)
    answers, history = answers_of(values, answers_field, place), _turns(item.history, place)
    more = (item.tools, item.answer_fields) if isinstance(item, Example) else ()
    if not answers or not (instruction or text_input or (more and history)):
        return ()
    return (Example(instruction, text_input, answers, history, *more),)


def _turns(history: object, place: str) -> tuple[Turn, ...]:
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise InstructionDataError(f"{place}: 'history' must be (role, content) pairs; got {abridged(history)}")
    turns = []
    for turn in history:
        match turn:
            case (str(role), str(content)) if role in ROLES:
                turns.append((ROLES[role], content))
            case (str(role), str(content), str(more)) if role in ROLES:
                turns.append((ROLES[role], content, more))
            case _:
                names = ", ".join(dict.fromkeys(ROLES.values()))
                raise InstructionDataError(
                    f"{place}: 'history' must be pairs of a role ({names}) and a text; got {abridged(turn)}"
                )
    return tuple(turns)
