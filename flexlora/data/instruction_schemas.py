"""Turns the columns of a row into examples, by the first schema whose columns hold something in that row.

A schema is a set of column names. What a column holds decides, not that it is there: tables that were merged have
columns of several schemas, empty where they do not belong.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flexlora.data.cells import Fields, answers_of, is_missing, text_of
from flexlora.data.conversations import ParsedTurn, examples_of, listed, turns_of
from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example
from flexlora.data.found_values import abridged, column_list
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.data.tools import TOOLS, tools_of

SCHEMAS = (
    "messages or conversations (a list of turns)",
    "prompt and completion",
    "instruction, response or output, and optionally context or input",
    "text alone",
)
CONVERSATIONS = ("messages", "conversations", "conversation")
INPUTS, ANSWERS, SYSTEMS = ("context", "input"), ("response", "output"), ("system", "system_prompt")
BEFORE = (*SYSTEMS, "history", *TOOLS)
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
COLUMN_NAMES = (*CONVERSATIONS, "prompt", "completion", "instruction", *INPUTS, *ANSWERS, "text", *BEFORE)


@dataclass(frozen=True)
class RowReader:
    """How the rows of a data set become examples.

    Attributes:
        notes: Told about columns that are not used.
        columns: Our column name -> the one in the data.
        trains_all: Whether the loss looks at all tokens (``data.loss_on: all``).
        elsewhere: Columns with a meaning of their own, such as that of the owner.
    """

    notes: DataNotes
    columns: Mapping[str, str]
    trains_all: bool = False
    elsewhere: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(COLUMN_NAMES))
        if unknown:
            raise InstructionDataError(
                f"data.columns must rename to {', '.join(COLUMN_NAMES)}; got {', '.join(unknown)}"
            )

    def examples(self, row: Fields, place: str) -> tuple[Example, ...]:
        """Return the examples of a row, none if its prompt or its answer is empty.

        Raises:
            InstructionDataError: No schema fits, a column holds something else than it should, or two columns that
                mean the same hold something.
        """
        fields = _without_empty_lists(renamed(row, self.columns, place))
        for name in PICTURES:
            if not is_missing(fields.get(name)) and name not in self.elsewhere:
                raise InstructionDataError(
                    f"{place}: the column {name!r} cannot be trained, only texts are; remove it, or the row"
                )
        schema = self._schema(fields, place)
        own = {*schema.names, *schema.beside, *BEFORE, *self.elsewhere}
        unused = (str(name) for name in fields if name not in own and not is_missing(fields[name]))
        self.notes.unused.update(unused)
        return schema.read(self, fields, place)

    def _schema(self, fields: Fields, place: str) -> "_Schema":
        fitting = [schema for schema in _SCHEMAS if schema.is_filled(fields)]
        # If none says anything, the row is empty; whether it could say something depends on its columns.
        fitting = fitting or [schema for schema in _SCHEMAS if schema.is_there(fields)]
        meant = [schema for schema in fitting if set(schema.names) & set(self.columns)]
        if not fitting:
            lacking = {"instruction": "response", "prompt": "completion"}
            lacks = [f"there is no {other!r}" for name, other in lacking.items() if name in fields]
            rule = lacks[0] if lacks else f"the columns must be {'; or '.join(SCHEMAS)}"
            raise InstructionDataError(
                f"{place}: {rule}; found {column_list(fields)}. "
                "Rename them, for example with data.columns={instruction: question, response: answer}"
            )
        return (meant or fitting)[0]

    def one_of(self, fields: Fields, names: tuple[str, ...], place: str) -> str:
        """Return which of the columns that mean the same holds something; a renamed one comes first.

        Raises:
            InstructionDataError: Several do, and not the same.
        """
        filled = [name for name in names if not is_missing(fields.get(name))]
        meant = [name for name in filled if name in self.columns] or filled
        if len(meant) > 1 and any(fields[name] != fields[meant[0]] for name in meant):
            first, second = meant[:2]
            raise InstructionDataError(
                f"{place}: {first!r} and {second!r} mean the same and both hold something: "
                f"{abridged(fields[first])} and {abridged(fields[second])}; empty one of them, or name the right "
                f"one in data.columns, for example {{{first}: {second}}}"
            )
        there = [name for name in names if name in fields]
        return (meant or there or [names[0]])[0]

    def before(self, fields: Fields, place: str) -> list[ParsedTurn]:
        """Return the turns that columns put before the question: of the system, and of a history."""
        name = self.one_of(fields, SYSTEMS, place)
        said = text_of(fields, name, place, optional=True)
        return ([ParsedTurn("system", said)] if said else []) + self._history(fields.get("history"), place)

    def _history(self, value: object, place: str) -> list[ParsedTurn]:
        if is_missing(value):
            return []
        turns: list[ParsedTurn] = []
        found = listed(value, place)
        if found is not None and all(isinstance(turn, Mapping) for turn in found):
            return turns_of(found, "history", place, self.notes, trains_all=self.trains_all)
        for pair in found or [None]:
            match pair:
                case [str(question), str(answer)]:
                    turns += [ParsedTurn("user", question), ParsedTurn("assistant", answer)]
                case _:
                    raise InstructionDataError(
                        f"{place}: 'history' must be a list of pairs of a question and its answer, or of turns; "
                        f"got {abridged(value)}"
                    )
        return turns


def renamed(fields: Fields, columns: Mapping[str, str], place: str) -> Fields:
    """Return the columns of a row under our names.

    Args:
        fields: Under the names of the data.
        columns: Our column name -> the one in the data.
        place: File and line of the row, for error messages.

    Raises:
        InstructionDataError: The row lacks one of these columns.
    """
    if not columns:
        return fields
    missing = sorted(set(columns.values()) - set(fields))
    if missing:
        raise InstructionDataError(
            f"{place}: data.columns names the column {missing[0]!r}, which is not there; found {column_list(fields)}"
        )
    taken = set(columns.values())
    kept = {name: value for name, value in fields.items() if name not in taken}
    return kept | {ours: fields[theirs] for ours, theirs in columns.items()}


def _without_empty_lists(fields: Fields) -> Fields:
    """Return a row in which columns of lists are None where a table has the text of an empty list or of nothing."""
    texts = {name: value for name in (*CONVERSATIONS, "history", *TOOLS) if isinstance(value := fields.get(name), str)}
    empty = [name for name, text in texts.items() if "".join(text.split()) in ("[]", "null", "None", "{}")]
    return {**fields, **dict.fromkeys(empty)} if empty else fields


def _filled(fields: Fields, names: tuple[str, ...]) -> bool:
    return any(not is_missing(fields.get(name)) for name in names)


def _read_conversation(reader: RowReader, fields: Fields, place: str) -> tuple[Example, ...]:
    name = reader.one_of(fields, CONVERSATIONS, place)
    if is_missing(fields.get(name)):
        return ()
    turns = turns_of(fields[name], name, place, reader.notes, trains_all=reader.trains_all)
    joined = _joined(reader.before(fields, place), turns, place)
    return examples_of(joined, tools_of(fields, place), place, reader.notes)


def _joined(before: list[ParsedTurn], turns: list[ParsedTurn], place: str) -> list[ParsedTurn]:
    """Return what columns put before a conversation, and the conversation: what the system says first, and once.

    Raises:
        InstructionDataError: A column and the first turn say different things.
    """
    if not before or not turns or turns[0].role != "system":
        return [*before, *turns]
    own, rest = turns[0], turns[1:]
    said = [turn.content for turn in before if turn.role == "system"]
    if own.content.strip() and any(text.strip() != own.content.strip() for text in said):
        raise InstructionDataError(
            f"{place}: both a column and the first turn say what the system says, and not the same: "
            f"{abridged(said[0])} and {abridged(own.content)}; remove one of the two"
        )
    return [*before, *rest] if said else [own, *before, *rest]


def _read_completion(reader: RowReader, fields: Fields, place: str) -> tuple[Example, ...]:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if is_missing(prompt) or is_missing(completion):
        return ()
    turns = reader.before(fields, place)
    answers = listed(completion, place) if not isinstance(completion, str) else None
    is_chat = bool(answers) and all(isinstance(turn, Mapping) for turn in answers or ())
    if not is_chat and isinstance(prompt, str):
        text_input = text_of(fields, reader.one_of(fields, INPUTS, place), place, optional=True)
        return _single(reader, fields, turns, prompt, text_input, answers_of(fields, "completion", place), place)
    for name in INPUTS:
        if not is_missing(fields.get(name)):
            raise InstructionDataError(
                f"{place}: {name!r} cannot stand beside a prompt or a completion of turns; put it into a turn of the "
                "user, or empty it"
            )
    asked = [ParsedTurn("user", prompt)] if isinstance(prompt, str) else None
    asked = asked or turns_of(prompt, "prompt", place, reader.notes, trains_all=reader.trains_all)
    turns = _joined(turns, asked, place)
    tools = tools_of(fields, place)
    if is_chat:
        own = turns_of(completion, "completion", place, reader.notes, trains_all=reader.trains_all)
        return examples_of([*turns, *own], tools, place, reader.notes, len(turns))
    texts = answers_of(fields, "completion", place)
    found = examples_of([*turns, ParsedTurn("assistant", texts[0])], tools, place, reader.notes, len(turns))
    return tuple(replace(example, outputs=texts) for example in found)


def _read_instruction(reader: RowReader, fields: Fields, place: str) -> tuple[Example, ...]:
    instruction = text_of(fields, "instruction", place)
    text_input = text_of(fields, reader.one_of(fields, INPUTS, place), place, optional=True)
    answers = answers_of(fields, reader.one_of(fields, ANSWERS, place), place)
    return _single(reader, fields, reader.before(fields, place), instruction, text_input, answers, place)


def _single(
    reader: RowReader,
    fields: Fields,
    before: list[ParsedTurn],
    instruction: str,
    text_input: str,
    answers: tuple[str, ...],
    place: str,
) -> tuple[Example, ...]:
    """Return the example of one question, or none if it or its answer is empty."""
    if not answers or not (instruction or text_input):
        return ()
    history = tuple(turn.as_turn() for turn in before)
    return (Example(instruction, text_input, answers, history, tools_of(fields, place)),)


def _read_text(reader: RowReader, fields: Fields, place: str) -> tuple[Example, ...]:
    text = text_of(fields, "text", place)
    if text and not reader.trains_all:
        raise InstructionDataError(
            f"{place}: a text alone has no answer that the loss could look at; set data.loss_on to all, or give "
            f"the columns {SCHEMAS[2]}"
        )
    return (Example("", "", (text,)),) if text else ()


@dataclass(frozen=True)
class _Schema:
    """A set of columns and what makes examples of them.

    Attributes:
        names: All its columns.
        needs: Of each of these groups one column must be there.
        holds: Of each of these one must hold something.
        read: Makes the examples.
        is_alone: Whether the columns of other schemas must be empty.
        beside: Columns of other schemas that are used where they stand beside these.
    """

    names: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]
    holds: tuple[tuple[str, ...], ...]
    read: Callable[[RowReader, Fields, str], tuple[Example, ...]]
    is_alone: bool = False
    beside: tuple[str, ...] = ()

    def is_there(self, fields: Fields) -> bool:
        """Return whether a row has the columns."""
        return all(any(name in fields for name in names) for names in self.needs)

    def is_filled(self, fields: Fields) -> bool:
        """Return whether they hold something."""
        others = tuple(name for name in COLUMN_NAMES if name not in self.names) if self.is_alone else ()
        return (
            self.is_there(fields)
            and not _filled(fields, others)
            and all(_filled(fields, names) for names in self.holds)
        )


_SCHEMAS = (
    _Schema(CONVERSATIONS, (CONVERSATIONS,), (CONVERSATIONS,), _read_conversation),
    _Schema(
        ("prompt", "completion"),
        (("prompt",), ("completion",)),
        (("prompt",), ("completion",)),
        _read_completion,
        beside=INPUTS,
    ),
    _Schema(
        ("instruction", *INPUTS, *ANSWERS),
        (("instruction",), ANSWERS),
        (("instruction", *INPUTS), ANSWERS),
        _read_instruction,
    ),
    _Schema(("text",), (("text",),), (("text",),), _read_text, is_alone=True),
)
