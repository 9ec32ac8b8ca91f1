"""Turns conversations into examples: one for each turn of the assistant that is to be trained.

Turns come as OpenAI and the Hugging Face libraries write them (``role`` and ``content``) or as ShareGPT does (``from``
and ``value``). What a turn holds besides is honoured, refused by name if it would be lost, or noted as not used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexlora.data.cells import is_missing, text_of
from flexlora.data.data_notes import DataNotes
from flexlora.data.examples import Example, Turn
from flexlora.data.found_values import abridged
from flexlora.data.instruction_errors import InstructionDataError
from flexlora.foreign import ForeignError, read_json

# What data call a role -> what chat templates call it. OpenAI's developers say what only the system said before.
ROLES: Mapping[str, str] = {
    **{name: "system" for name in ("system", "developer")},
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bard", "bing", "model", "function_call")},
    **{name: "tool" for name in ("tool", "function", "observation", "function_response", "ipython")},
}
# Fields that say whether a turn of the assistant is trained.
WEIGHTS = ("weight", "train", "training", "trainable", "loss")
# Fields that would be lost -> why, and what to do about them.
REFUSED = {
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"), "cannot be trained; put it into the content, or remove it"
    ),
    **dict.fromkeys(("audio", "image", "images", "video", "videos"), "cannot be trained, only texts are; remove it"),
    "refusal": "cannot be trained; put it into the content",
    **dict.fromkeys(("mask", "masked"), "may mean either; say weight: 0 or weight: 1 instead"),
    **dict.fromkeys(
        ("train_detail", "training_detail"), "would train parts of a turn, which is all or nothing; remove it"
    ),
}
_KNOWN = {"role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id", *WEIGHTS, *REFUSED}


@dataclass(frozen=True)
class ParsedTurn:
    """One turn of a conversation.

    Attributes:
        role: As chat templates call it.
        content: As a text, tool calls as JSON behind it.
        fields: JSON object of what a chat template is given besides; empty for none.
        is_trained: What the turn says about that; None if nothing.
    """

    role: str
    content: str
    fields: str = ""
    is_trained: bool | None = None

    def as_turn(self) -> Turn:
        """Return the turn as histories hold it."""
        return (self.role, self.content, self.fields) if self.fields else (self.role, self.content)


def examples_of(
    turns: Sequence[ParsedTurn], tools: str, place: str, notes: DataNotes, first: int = 0
) -> tuple[Example, ...]:
    """Return one example per answer of the assistant, with everything before its question as history.

    Turns whose weight is 0 are context only, and so are those before the first question.

    Args:
        turns: The conversation.
        tools: JSON list of tools; empty for none.
        place: File and line of the row, for error messages.
        notes: Told about answers without a question.
        first: Turns before this one are context only.

    Raises:
        InstructionDataError: An answer follows neither a question nor the result of a tool.
    """
    examples = []
    for index, turn in enumerate(turns):
        if index < first or turn.role != "assistant" or not turn.content.strip() or turn.is_trained is False:
            continue
        before = turns[index - 1] if index else None
        if all(earlier.role != "user" for earlier in turns[:index]):
            notes.num_unasked += 1
        elif before is None or before.role not in ("user", "tool"):
            raise InstructionDataError(
                f"{place}, turn {index + 1}: an answer of the assistant must follow a turn of the user or of a tool; "
                f"got one after {before.role if before else 'nothing'}"
            )
        elif before.role == "user" and not before.content.strip():
            notes.num_unasked += 1
        else:
            # A question is cut last; whatever else an answer follows stays the turn that it is.
            asks = before.role == "user" and not before.fields
            history = tuple(earlier.as_turn() for earlier in turns[: index - 1 if asks else index])
            question = before.content if asks else ""
            examples.append(Example(question, "", (turn.content,), history, tools, turn.fields))
    return tuple(examples)


def turns_of(value: object, name: str, place: str, notes: DataNotes, *, trains_all: bool = False) -> list[ParsedTurn]:
    """Return the turns that a column holds, as a list or as the JSON of one.

    Args:
        value: Of the column.
        name: Of the column.
        place: File and line of the row, for error messages.
        notes: Told about fields that are not used.
        trains_all: Whether the loss looks at all tokens, whatever a turn says.

    Raises:
        InstructionDataError: A turn is broken or holds what would be lost; the message names turn and field.
    """
    messages = listed(value, place)
    if messages is None:
        raise InstructionDataError(f"{place}: {name} must be a list of turns; got {abridged(value)}")
    turns = []
    for number, message in enumerate(messages, start=1):
        turn = f"{place}, turn {number}"
        if not isinstance(message, Mapping):
            raise InstructionDataError(f"{turn}: must be an object with role and content; got {abridged(message)}")
        turns.append(_turn(message, turn, notes, trains_all))
    return turns


def listed(value: object, place: str) -> list[object] | None:
    """Return a list, or what the JSON of one holds, as in a cell of a table; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed_json(value, place)
    return list(value) if isinstance(value, list | tuple) else None


def parsed_json(text: str, place: str) -> object:
    """Return what a JSON text in a cell or a field says.

    Raises:
        InstructionDataError: It is no JSON.
    """
    try:
        return read_json(text, place)
    except ForeignError as error:
        raise InstructionDataError(f"{place}: {abridged(text)} must be JSON ({error.reason}); repair it") from error


def _turn(message: Mapping[str, object], place: str, notes: DataNotes, trains_all: bool) -> ParsedTurn:
    for field, remedy in REFUSED.items():
        if not is_missing(message.get(field)):
            raise InstructionDataError(f"{place}: the field {field!r} {remedy}")
    role, is_call = _role(message, place)
    calls = _calls(message, place, is_call)
    content = "" if is_call else _content(message, place, optional=bool(calls))
    notes.unused.update(f"{field} (of turns)" for field in set(message) - _KNOWN if not is_missing(message[field]))
    fields: dict[str, object] = {
        name: message[name] for name in ("name", "tool_call_id") if not is_missing(message.get(name))
    }
    text = content
    if calls:
        if role != "assistant":
            raise InstructionDataError(f"{place}: only the assistant may have 'tool_calls'; the role is {role}")
        fields |= {"content": content, "tool_calls": calls}
        functions = [call["function"] if isinstance(call, Mapping) else call for call in calls]
        text = "\n".join(part for part in (content, _json(functions)) if part)
    is_trained = _is_trained(message, role, place, trains_all)
    return ParsedTurn(role, text, _json(fields) if fields else "", is_trained)


def _role(message: Mapping[str, object], place: str) -> tuple[str, bool]:
    """Return who speaks as chat templates call it, and whether ShareGPT's word says that the turn is a tool call."""
    names = {field: message[field] for field in ("role", "from") if not is_missing(message.get(field))} or {
        "role": None
    }
    roles = {}
    for field, name in names.items():
        roles[field] = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if roles[field] is None:
            raise InstructionDataError(
                f"{place}: {field} must be system, user, assistant or tool, or another name of one of these; "
                f"got {abridged(name)}"
            )
    check_equal(roles, names, place)
    return str(next(iter(roles.values()))), any(str(name).strip().lower() == "function_call" for name in names.values())


def check_equal(meant: Mapping[str, object], written: Mapping[str, object], place: str) -> None:
    """Refuse fields that say the same thing in different ways.

    Args:
        meant: Field -> what it means, of those that hold something.
        written: Field -> what it holds.
        place: File, line and turn, for error messages.

    Raises:
        InstructionDataError: Two of them do not mean the same; the message names both.
    """
    first = next(iter(meant), "")
    for field in meant:
        if meant[field] != meant[first]:
            raise InstructionDataError(
                f"{place}: {first!r} and {field!r} contradict each other: {abridged(written[first])} and "
                f"{abridged(written[field])}; keep the right one and empty the other"
            )


def _content(message: Mapping[str, object], place: str, *, optional: bool) -> str:
    """Return what a turn says in the one of its fields that says something."""
    there = [field for field in ("content", "value") if field in message]
    if not there:
        return text_of(message, "content", place, optional=optional)
    texts = {field: _text(message, field, place) for field in there}
    filled = {field: text for field, text in texts.items() if text.strip()}
    check_equal(filled, message, place)
    return next(iter(filled.values()), "")


def _text(message: Mapping[str, object], field: str, place: str) -> str:
    """Return what a field of a turn says; parts that are texts are joined."""
    value = message[field]
    if isinstance(value, Mapping) and value:
        value = [value]
    if not isinstance(value, list | tuple):
        return text_of(message, field, place)
    texts = []
    for part in value:
        inner = part if isinstance(part, Mapping) else {"text": part}
        text = inner.get("text")
        # Where parts were unified, each has the fields of all, empty but for its own.
        is_empty = all(is_missing(held) for name, held in inner.items() if name != "type")
        if not str(inner.get("type") or "text").endswith("text") or not (isinstance(text, str) or is_empty):
            raise InstructionDataError(
                f"{place}: {field!r} must be a text or a list of texts; one of its parts is {abridged(part)}: only "
                "texts are trained, remove the row or the part"
            )
        texts.append("" if is_empty else str(text))
    return "".join(texts)


def _calls(message: Mapping[str, object], place: str, is_call: bool) -> list[Mapping[str, object]]:
    """Return the tool calls of a turn, which one of three fields holds.

    Args:
        message: The turn.
        place: File, line and turn, for error messages.
        is_call: Whether the turn is nothing but a call, as ShareGPT writes it.
    """
    written: dict[str, object] = {}
    found: dict[str, list[Mapping[str, object]]] = {}
    if not is_missing(message.get("tool_calls")):
        written["tool_calls"] = message["tool_calls"]
        calls = listed(written["tool_calls"], place)
        if calls is None:
            raise InstructionDataError(
                f"{place}: 'tool_calls' must be a list of calls; got {abridged(written['tool_calls'])}"
            )
        found["tool_calls"] = [_call(call, place) for call in calls]
    if not is_missing(message.get("function_call")):
        written["function_call"] = message["function_call"]
        found["function_call"] = [_call(written["function_call"], place)]
    if is_call and (text := _content(message, place, optional=bool(found))):
        field = next(field for field in ("content", "value") if not is_missing(message.get(field)))
        written[field], found[field] = text, [_call(parsed_json(text, place), place)]
    check_equal({field: [call["function"] for call in calls] for field, calls in found.items()}, written, place)
    if is_call and not found:
        raise InstructionDataError(f"{place}: a turn of function_call must hold a call; got nothing")
    return next(iter(found.values()), [])


def _call(call: object, place: str) -> Mapping[str, object]:
    """Return a tool call as chat templates take it: its arguments as an object."""
    if isinstance(call, str):
        call = parsed_json(call, place)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InstructionDataError(
            f"{place}: a tool call must be an object with the name and the arguments of a function; got "
            f"{abridged(call)}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        arguments = parsed_json(arguments, place)
    identity = {"id": call["id"]} if isinstance(call, Mapping) and not is_missing(call.get("id")) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _is_trained(message: Mapping[str, object], role: str, place: str, trains_all: bool) -> bool | None:
    flags = {field: message[field] for field in WEIGHTS if not is_missing(message.get(field))}
    for field, value in flags.items():
        if value not in (0, 1):
            raise InstructionDataError(f"{place}: {field!r} must be 0 or 1; got {abridged(value)}")
        if role == "assistant" and not value and trains_all:
            raise InstructionDataError(
                f"{place}: {field!r} is 0, but data.loss_on=all trains every turn; set data.loss_on to answers"
            )
        if role != "assistant" and value and not trains_all:
            raise InstructionDataError(
                f"{place}: {field!r} is 1 on a turn of {role}, and only the assistant's are trained; remove it, or set "
                "data.loss_on to all"
            )
    check_equal({field: bool(value) for field, value in flags.items()}, flags, place)
    return bool(next(iter(flags.values()))) if flags else None


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
