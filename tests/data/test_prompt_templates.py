"""Templates of prompts, and where in their text the instruction and the input are."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flexlora.data.examples import Example
from flexlora.data.prompt_templates import PromptError, render

CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REVERSE = Example("Reverse the text.", "abc", ("cba", "CBA"))


def rendered(example, template, chat_template=CHAT_TEMPLATE):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({}, [])))
    tokenizer.chat_template = chat_template
    return render(example, tokenizer, template)


def text(example, template, **options):
    return rendered(example, template, **options).text


def test_the_alpaca_template_has_its_three_headings():
    assert text(REVERSE, "alpaca") == ("### Instruction:\nReverse the text.\n\n### Input:\nabc\n\n### Response:\n")
    assert text(Example("Say hi.", "", ("hi",)), "alpaca") == ("### Instruction:\nSay hi.\n\n### Response:\n")


def test_the_plain_template_is_the_text_alone():
    assert text(REVERSE, "plain") == "Reverse the text.\nabc\n"


def test_the_chat_template_is_the_tokenizers_own():
    assert text(REVERSE, "chat") == "<s><|user|>Reverse the text.\n\nabc</s><|assistant|>"


def test_earlier_turns_come_first():
    example = Example("And now?", "", ("x",), history=(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")))
    assert text(example, "alpaca") == (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nAnd now?\n\n### Response:\n"
    )
    assert text(example, "chat") == (
        "<s><|system|>Be brief.</s><|user|>Hi</s><|assistant|>Hello</s><|user|>And now?</s><|assistant|>"
    )


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_key_to_change():
    with pytest.raises(PromptError, match=r"data.template=chat needs a tokenizer with a chat template"):
        text(REVERSE, "chat", chat_template=None)


def test_a_chat_template_that_refuses_a_turn_is_explained():
    with pytest.raises(PromptError, match=r"refuses turns of user .no system turns.; set data.template"):
        text(REVERSE, "chat", chat_template="{{ raise_exception('no system turns') }}")


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_the_places_of_instruction_and_input_are_known(template):
    example = Example(" Reverse abc. ", " abc", ("cba",), history=(("user", "Reverse abc."), ("assistant", "abc")))
    prompt = rendered(example, template)
    instruction, text_input = (prompt.text[slice(*place)] for place in (prompt.instruction, prompt.input))
    assert (instruction.strip(), text_input.strip()) == ("Reverse abc.", "abc")
    assert prompt.text.rindex("abc") == prompt.input[1] - 3


def test_an_unknown_template_is_refused():
    with pytest.raises(PromptError, match=r"data.template must be one of alpaca, chat, plain; got 'other'"):
        text(REVERSE, "other")
