"""Writes an example as the text of a prompt, in one of several templates."""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from flexlora.data.examples import Example
from flexlora.errors import FlexLoraError

Template = Literal["alpaca", "chat", "plain"]


class PromptError(FlexLoraError, ValueError):
    """An example cannot be written with this template, tokenizer or length."""


@dataclass(frozen=True)
class Rendered:
    """A prompt as text, with the places of what may be cut.

    Attributes:
        text: The prompt.
        instruction: Where the instruction starts and ends, in characters.
        input: Where the input starts and ends.
    """

    text: str
    instruction: tuple[int, int]
    input: tuple[int, int]


def render(example: Example, tokenizer: PreTrainedTokenizerBase, template: Template) -> Rendered:
    """Return the prompt as text, without what the tokenizer adds in front.

    Raises:
        PromptError: There is no such template, or the tokenizer has no chat template or refuses the turns.
    """
    if template == "alpaca":
        return _render_alpaca(example)
    if template == "plain":
        return _render_plain(example)
    if template == "chat":
        return _render_chat(example, tokenizer)
    raise PromptError(f"data.template must be one of alpaca, chat, plain; got {template!r}")


def _render_alpaca(example: Example) -> Rendered:
    headings = {"user": "### Instruction:\n", "assistant": "### Response:\n"}
    before = "".join(f"{headings.get(role, '')}{content}\n\n" for role, content in example.history)
    return _join(before + headings["user"], example, "\n\n### Input:\n", "\n\n### Response:\n")


def _render_plain(example: Example) -> Rendered:
    return _join("".join(f"{content}\n" for _, content in example.history), example, "\n", "\n")


def _join(before: str, example: Example, between: str, after: str) -> Rendered:
    head = before + example.instruction
    start = len(head) + len(between) if example.input else len(head)
    text = (head + between + example.input if example.input else head) + after
    return Rendered(text, (len(before), len(head)), (start, start + len(example.input)))


def _render_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if not tokenizer.chat_template:
        raise PromptError(
            "data.template=chat needs a tokenizer with a chat template and this one has none; "
            "set data.template to alpaca or plain, or use an instruction-tuned model"
        )
    request = "\n\n".join(part for part in (example.instruction, example.input) if part)
    messages = [{"role": role, "content": content} for role, content in [*example.history, ("user", request)]]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # Templates raise whatever their authors chose, for example on a system turn.
        roles = ", ".join(message["role"] for message in messages)
        raise PromptError(
            f"the tokenizer's chat template refuses turns of {roles} ({error}); "
            "set data.template to alpaca or plain, or remove the turns it does not know"
        ) from error
    # Templates may strip the ends of a turn, so the parts are looked for without theirs.
    instruction = _find(text, example.instruction.strip(), max(text.rfind(request.strip()), 0))
    return Rendered(text, instruction, _find(text, example.input.strip(), instruction[1]))


def _find(text: str, part: str, start: int) -> tuple[int, int]:
    """Return where ``part`` is in ``text`` from ``start`` on; empty, so that nothing is cut, if the template hid it."""
    found = text.find(part, start)
    return (found, found + len(part)) if found >= 0 else (start, start)
