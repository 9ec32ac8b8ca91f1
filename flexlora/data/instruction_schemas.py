"""Turns the columns of a row into examples, by the first schema that fits.

A schema is a set of column names. The first row decides for all.
"""

from collections.abc import Callable, Mapping

from flexlora.data.examples import Example
from flexlora.data.found_values import abridged, column_list
from flexlora.data.instruction_files import Fields, InstructionDataError

SCHEMAS = (
    "messages (a list of role and content)",
    "prompt and completion",
    "instruction, response or output, and optionally context or input",
)
COLUMN_NAMES = ("messages", "prompt", "completion", "instruction", "context", "input", "response", "output")

ROLES = ("system", "user", "assistant")

# Turns the columns of a row and its place, for error messages, into examples; none if prompt or answer is empty.
Convert = Callable[[Fields, str], tuple[Example, ...]]


def schema_of(fields: Fields, columns: Mapping[str, str], place: str) -> Convert:
    """Return what turns rows into examples, given the first of them; of several schemas, one with a renamed column.

    Raises:
        InstructionDataError: No schema fits, or ``columns`` renames to a name that no schema has.
    """
    unknown = sorted(set(columns) - set(COLUMN_NAMES))
    if unknown:
        raise InstructionDataError(f"data.columns must rename to {', '.join(COLUMN_NAMES)}; got {', '.join(unknown)}")
    found = set(renamed(fields, columns, place))
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
        f"{place}: the columns must be {'; or '.join(SCHEMAS)}; found {column_list(fields)}. "
        "Rename them, for example with data.columns={instruction: question, response: answer}"
    )


def renamed(fields: Fields, columns: Mapping[str, str], place: str) -> Fields:
    """Return the columns of a row under our names.

    Args:
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


def _from_instruction(fields: Fields, place: str) -> tuple[Example, ...]:
    instruction = text_of(fields, "instruction", place)
    text_input = text_of(fields, "context" if "context" in fields else "input", place, optional=True)
    answers = answers_of(fields, "output" if "output" in fields and "response" not in fields else "response", place)
    return (Example(instruction, text_input, answers),) if answers and (instruction or text_input) else ()


def _from_completion(fields: Fields, place: str) -> tuple[Example, ...]:
    prompt, answers = text_of(fields, "prompt", place), answers_of(fields, "completion", place)
    return (Example(prompt, "", answers),) if answers and prompt else ()


def _from_messages(fields: Fields, place: str) -> tuple[Example, ...]:
    """Return one example per answer of the assistant, with everything before its question as history."""
    messages = fields.get("messages")
    if not isinstance(messages, list):
        raise InstructionDataError(f"{place}: messages must be a list of turns; got {abridged(messages)}")
    turns: list[tuple[str, str]] = []
    examples = []
    for number, message in enumerate(messages, start=1):
        turn = f"{place}, turn {number}"
        if not isinstance(message, dict):
            raise InstructionDataError(f"{turn}: must be an object with role and content; got {abridged(message)}")
        role, content = message.get("role"), text_of(message, "content", turn)
        if role not in ROLES:
            raise InstructionDataError(f"{turn}: role must be system, user or assistant; got {abridged(role)}")
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


def text_of(fields: Fields, name: str, place: str, *, optional: bool = False) -> str:
    """Return a text without outer white space, empty if there is none.

    Args:
        place: File and line of the row, for error messages.
        optional: Whether the column may be missing.

    Raises:
        InstructionDataError: The column is missing or holds something else.
    """
    if name not in fields and not optional:
        raise InstructionDataError(f"{place}: there is no {name!r}; found {column_list(fields)}")
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InstructionDataError(f"{place}: {name!r} must be a text; got {abridged(value)}")
    return (value or "").strip()


def answers_of(fields: Fields, name: str, place: str) -> tuple[str, ...]:
    """Return the accepted answers that are not empty; a list in the data is several of them.

    Raises:
        InstructionDataError: The column is missing or holds something else.
    """
    value = fields.get(name)
    if not isinstance(value, list | tuple):
        text = text_of(fields, name, place)
        return (text,) if text else ()
    if not all(isinstance(text, str) for text in value):
        raise InstructionDataError(f"{place}: {name!r} must be a text or a list of texts; got {abridged(value)}")
    return tuple(dict.fromkeys(text.strip() for text in value if text.strip()))
