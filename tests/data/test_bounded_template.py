"""A chat template of somebody else cannot hold a run up."""

import copy
import time

import pytest

from flexlora.data import bounded_template
from flexlora.data.bounded_template import TemplateError, apply_template
from flexlora.data.examples import Example
from flexlora.data.prompt_templates import render

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [{"role": "user", "content": "hello"}]


@pytest.fixture(name="tokenizer")
def _tokenizer(tokenizer):
    """Returns a tokenizer of the test's own, whose template it may change."""
    return copy.deepcopy(tokenizer)


def test_a_template_writes_what_transformers_writes(tokenizer) -> None:
    tokenizer.chat_template = CHATML
    expected = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert (
        apply_template(tokenizer, TURNS, add_generation_prompt=True)
        == expected
        == ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    )


def test_a_template_that_loops_is_ended(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(bounded_template, "MOST_SECONDS", 0.3)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}x"
    tokenizer.chat_template = loop
    start = time.monotonic()
    with pytest.raises(TemplateError, match=r"must be done in 0\.3 s; it was not"):
        render(Example("a", "b", ("c",)), tokenizer, "chat")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "template",
    ["{{ 9 ** 9 ** 9 }}", "{{ 'x' * 99999999999 }}", "{{ 'x' * 9999 * 9999 * 9999 }}", "{{ " + "9" * 5000 + " }}"],
)
def test_a_template_that_computes_out_of_all_proportion_is_refused(tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match="must not compute powers or numbers above 1,000,000; line 1 has"):
        apply_template(tokenizer, TURNS)


def test_what_a_template_raises_itself_is_passed_on(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('no \x1b[31m turns') }}"
    with pytest.raises(Exception, match=r"no .* turns"):
        apply_template(tokenizer, TURNS)
    with pytest.raises(ValueError, match="refuses turns of user") as caught:
        render(Example("a", "b", ("c",)), tokenizer, "chat")
    assert "\x1b" not in str(caught.value)
