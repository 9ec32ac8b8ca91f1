"""Writes conversations as the tokenizer's own chat template does, and finds what ends a turn of the assistant.

A turn often ends in a token of its own (``<end_of_turn>``, ``<|im_end|>``), not in the end of a sequence. Training and
generation take it from a rendered conversation.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from flexlora.data.bounded_template import TemplateError, apply_template
from flexlora.data.examples import Example, Turn
from flexlora.errors import FlexLoraError

_QUESTION, _ANSWER = "zqquestionqz", "zqanswerqz"
"""What templates are tried on: words that none of them writes."""

_UNSEEN = "\ufdd0"
"""Stands in texts of others where a special token in them is broken; no text holds it, as Unicode reserves it."""


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
    follows = whole.startswith(prompt)
    start = whole.find(_ANSWER, len(prompt) if follows else 0)
    before = whole[len(prompt) : start] if follows and start >= 0 else ""
    after = whole[start + len(_ANSWER) :] if start >= 0 else ""
    return TurnFrame(before, after, _end_in(after, tokenizer))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the tokens that stand for no text, by id."""
    special = {int(number): token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def without_special_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Return an example in whose prompt nothing reads as a special token; it is itself if nothing does.

    Such texts are broken by a character at which ``parts_of`` takes a prompt apart: the tokens of its parts are those
    of the text.
    """
    special = [text for text in special_tokens(tokenizer).values() if len(text) > 1]
    texts = (example.instruction, example.input, *(turn[1] for turn in example.history))
    if not any(token in text for token in special for text in texts):
        return example

    def broken(text: str) -> str:
        for token in sorted(special, key=len, reverse=True):
            text = text.replace(token, token[0] + _UNSEEN + token[1:])
        return text

    history = tuple((turn[0], broken(turn[1]), *turn[2:]) for turn in example.history)
    return replace(
        example, instruction=broken(example.instruction), input=broken(example.input), history=cast(Any, history)
    )


def parts_of(text: str) -> list[str]:
    """Return the parts of a prompt between the places where ``without_special_tokens`` broke it."""
    return text.split(_UNSEEN)


def _end_in(after: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first token that ends a turn, of a text behind an answer: a special one, or else an added one."""
    ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    special = special_tokens(tokenizer)
    # Some tokenizers have added tokens for runs of spaces; those end nothing.
    added = {int(number) for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return next((token for token in ids if token in special), next((token for token in ids if token in added), None))


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
    as_parts = _wants_parts(tokenizer, str(tokenizer.chat_template))
    if tools and "tools" not in str(tokenizer.chat_template):
        raise PromptError(
            "the data offer the assistant tools and the tokenizer's chat template does not mention any; "
            "set data.template to alpaca or plain, use a model that calls tools, or remove the column tools"
        )
    try:
        return apply_template(
            tokenizer,
            [_in_parts(message) if as_parts else dict(message) for message in messages],
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


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn whose content is a list of parts, as templates of models for images and sound expect it."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


@lru_cache(maxsize=16)
def _wants_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether a chat template writes contents that are lists of parts, and no others; tried on two words.

    Args:
        tokenizer: That of the template.
        template: For the cache: a tokenizer may be given another one.

    Raises:
        PromptError: It writes neither.
    """
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    refused = False
    for as_parts in (False, True):
        try:
            text = apply_template(tokenizer, [_in_parts(turn) if as_parts else turn for turn in turns]).casefold()
        except TemplateError:
            raise
        except Exception:  # Whatever it refuses here it is asked again with the turns of an example, and that is told.
            refused = refused or not as_parts
            continue
        if _QUESTION in text and _ANSWER in text:
            return as_parts
    if refused:
        return False
    raise PromptError(
        "the tokenizer's chat template leaves out what the user or the assistant says; "
        "set data.template to alpaca or plain, or repair the template"
    )
