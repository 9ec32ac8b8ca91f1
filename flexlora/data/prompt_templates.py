"""Writes an example as the text of a prompt, in one of several templates."""

from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from flexlora.data.chat_template import PromptError, prompt_text, request_of
from flexlora.data.examples import Example

Template = Literal["alpaca", "chat", "plain"]

_HEADINGS = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Tool result:\n"}


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
    """Return the prompt as text, without what the tokenizer adds in front; empty for a text that stands alone.

    Raises:
        PromptError: There is no such template, or the tokenizer has no chat template or refuses the turns.
    """
    if template in get_args(Template) and example.is_text_alone:
        return Rendered("", (0, 0), (0, 0))
    if template == "alpaca":
        return _render_alpaca(example)
    if template == "plain":
        return _render_plain(example)
    if template == "chat":
        return _render_chat(example, tokenizer)
    raise PromptError(f"data.template must be one of alpaca, chat, plain; got {template!r}")


def _render_alpaca(example: Example) -> Rendered:
    blocks = [f"{_HEADINGS.get(role, '')}{content}\n\n" for role, content, *_ in example.history]
    tools = f"### Tools:\n{example.tools}\n\n" if example.tools else ""
    return _join(tools + "".join(blocks), _HEADINGS["user"], example, "\n\n### Input:\n", "\n\n", "### Response:\n")


def _render_plain(example: Example) -> Rendered:
    tools = f"{example.tools}\n" if example.tools else ""
    return _join(tools + "".join(f"{content}\n" for _, content, *_ in example.history), "", example, "\n", "\n", "")


def _join(before: str, heading: str, example: Example, between: str, end: str, after: str) -> Rendered:
    """Return the parts in their order; ``end`` follows a request and has followed each turn in ``before``."""
    if not request_of(example):
        # The answer follows a turn, the last one, whose content may be cut as an input is.
        last = (len(before) - len(end) - len(example.history[-1][1]), len(before) - len(end))
        return Rendered(before + after, (last[0], last[0]), last)
    head = before + heading + example.instruction
    start = len(head) + len(between) if example.input else len(head)
    text = (head + between + example.input if example.input else head) + end + after
    return Rendered(text, (len(before) + len(heading), len(head)), (start, start + len(example.input)))


def _render_chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    text, request = prompt_text(example, tokenizer), request_of(example)
    # Templates may strip the ends of a turn, so the parts are looked for without theirs.
    if not request:
        last = example.history[-1][1].strip()
        place = _find(text, last, max(text.rfind(last), 0))
        return Rendered(text, (place[0], place[0]), place)
    instruction = _find(text, example.instruction.strip(), max(text.rfind(request.strip()), 0))
    return Rendered(text, instruction, _find(text, example.input.strip(), instruction[1]))


def _find(text: str, part: str, start: int) -> tuple[int, int]:
    """Return where ``part`` is in ``text`` from ``start`` on; empty, so that nothing is cut, if the template hid it."""
    found = text.find(part, start)
    return (found, found + len(part)) if found >= 0 else (start, start)
