"""Writes conversations as the tokenizer's own chat template does, and finds what ends a turn of the assistant.

A turn often ends in a token of its own (``<end_of_turn>``, ``<|im_end|>``), not in the end of a sequence. Training and
generation take it from a rendered conversation.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexlora.data.bounded_template import TemplateError, apply_template
from flexlora.data.examples import Example, Turn
from flexlora.errors import FlexLoraError

_QUESTION, _ANSWER = "question", "answer"


class PromptError(FlexLoraError, ValueError):
    """An example cannot be written with this template, tokenizer or length."""


@dataclass(frozen=True)
class TurnFrame:
    """What a chat template writes around an answer.

    Attributes:
        before: Between the prompt of generation and the answer, such as an empty thought.
        after: Behind the answer.
        end: Token in ``after`` that ends the turn; None if there is none, as for templates of plain words.
    """

    before: str
    after: str
    end: int | None


def request_of(example: Example) -> str:
    """Return what the last turn of the user says: the instruction and its input."""
    return "\n\n".join(part for part in (example.instruction, example.input) if part)


def prompt_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt as the chat template writes it.

    Raises:
        PromptError: There is no chat template, or it refuses the turns or leaves tools out.
    """
    return _rendered(tokenizer, _messages(example), example.tools, add_generation_prompt=True)


def conversation_text(example: Example, answer: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return prompt and answer as the chat template writes them.

    Raises:
        PromptError: As ``prompt_text``.
    """
    turn: Turn = ("assistant", answer, example.answer_fields) if example.answer_fields else ("assistant", answer)
    messages = [*_messages(example), _message(turn)]
    return _rendered(tokenizer, messages, example.tools, add_generation_prompt=False)


def turn_frame(tokenizer: PreTrainedTokenizerBase) -> TurnFrame:
    """Return what the chat template writes around an answer, tried on a conversation of two words.

    Raises:
        PromptError: As ``prompt_text``.
    """
    example = Example(_QUESTION, "", (_ANSWER,))
    prompt, whole = prompt_text(example, tokenizer), conversation_text(example, _ANSWER, tokenizer)
    start = whole.rfind(_ANSWER)
    before = whole[len(prompt) : start] if whole.startswith(prompt) and start >= len(prompt) else ""
    after = whole[start + len(_ANSWER) :] if start >= 0 else ""
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    known = special_tokens(tokenizer)
    return TurnFrame(before, after, next((token for token in ids if token in known), None))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that stand for no text, by id."""
    special = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _messages(example: Example) -> list[dict[str, Any]]:
    request = request_of(example)
    return [_message(turn) for turn in (*example.history, *([("user", request)] if request else []))]


def _message(turn: Turn) -> dict[str, Any]:
    role, content, *fields = turn
    return {"role": role, "content": content, **(json.loads(fields[0]) if fields else {})}


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: str,
    *,
    add_generation_prompt: bool,
) -> str:
    if not tokenizer.chat_template:
        raise PromptError(
            "data.template=chat needs a tokenizer with a chat template and this one has none; "
            "set data.template to alpaca or plain, or use an instruction-tuned model"
        )
    if tools and "tools" not in str(tokenizer.chat_template):
        raise PromptError(
            "the data offer the assistant tools and the tokenizer's chat template does not mention any; "
            "set data.template to alpaca or plain, use a model that calls tools, or remove the column tools"
        )
    try:
        return apply_template(
            tokenizer,
            [dict(message) for message in messages],
            tools=json.loads(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError:
        raise
    except Exception as error:  # Templates raise whatever their authors chose, for example on a system turn.
        roles = ", ".join(str(message["role"]) for message in messages)
        raise PromptError(
            f"the tokenizer's chat template refuses turns of {roles} ({error}); "
            "set data.template to alpaca or plain, or remove the turns it does not know"
        ) from error
