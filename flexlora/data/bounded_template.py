"""Writes conversations in a chat template, which is a program of somebody else, in bounded time and memory."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from flexlora.errors import FlexLoraError
from flexlora.time_limit import TimeIsUp, within

MOST_SECONDS = 5.0
"""For one conversation; a template takes a millisecond."""

LARGEST_NUMBER = 1_000_000
"""Largest whole number in a template, and largest product of those that something is multiplied by."""


class TemplateError(FlexLoraError, ValueError):
    """A chat template that cannot be used; a template's own refusal of turns is passed on as it is."""


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return a conversation as text.

    Args:
        messages: Turns with ``role`` and ``content``.
        options: Of ``apply_chat_template``.

    Raises:
        TemplateError: If the template takes too long, or computes numbers or texts out of all proportion.
        Exception: Whatever a template chose to raise, for example on a system turn.
    """
    for template in _templates(tokenizer):
        _check(template)
    try:
        with within(MOST_SECONDS):
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))  # type: ignore[arg-type]
    except TimeIsUp:
        raise TemplateError(
            f"the tokenizer's chat template must be done in {MOST_SECONDS:g} s; it was not, so it probably loops: "
            "repair it, or set data.template to alpaca or plain"
        ) from None


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the templates of a tokenizer, which may have several under names."""
    template: Any = tokenizer.chat_template
    return [text for text in (template.values() if isinstance(template, dict) else [template]) if isinstance(text, str)]


@lru_cache(maxsize=64)
def _check(template: str) -> None:
    """Raise if a template asks for powers or for huge numbers, whose computation nothing could end.

    Raises:
        TemplateError: Naming the line.
    """
    product, before = 1, ""
    try:
        for line, kind, value in jinja2.Environment().lex(template):
            if kind in ("integer", "float"):
                # Not of a text that int() would refuse or take long over.
                number = float(value.replace("_", "")) if kind == "float" or len(value) < 300 else float("inf")
                product = product * max(number, 1) if before == "*" else product
                if number > LARGEST_NUMBER or product > LARGEST_NUMBER:
                    raise _refused(line, value)
            if kind == "operator" and value == "**":
                raise _refused(line, value)
            before = value if kind != "whitespace" else before
    except jinja2.TemplateSyntaxError:
        return  # transformers knows more tags, and says what is wrong with others.


def _refused(line: int, value: str) -> TemplateError:
    return TemplateError(
        f"the tokenizer's chat template must not compute powers or numbers above {LARGEST_NUMBER:,}; line {line} has "
        f"{value:.40}: repair it, or set data.template to alpaca or plain"
    )
