"""Tokens of prompts and answers, what the loss sees, and what is cut, with tokenizers made on the spot."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flexlora.data.examples import Example
from flexlora.data.prompt_templates import PromptError, render
from flexlora.data.prompts import (
    IGNORED,
    encode,
    encode_many,
    encode_prompt,
    encode_prompts,
    num_labels,
    padding_token,
)

SHARED = Path(os.environ.get("FLEXLORA_SHARED", Path(__file__).parents[2].parent / "shared"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(special=SPECIAL, *, adds_bos=True, chat_template=None):
    """A tokenizer of one token per byte, like an untrained byte-level BPE."""
    names = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = chat_template
    return fast


def metaspace():
    """A tokenizer of characters that puts a word mark in front of every text, like those of Llama 2."""
    names = ["<s>", "</s>", "<unk>", *map(chr, range(32, 127)), "\n", "▁"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **SPECIAL)


BYTES = byte_level(chat_template=CHAT_TEMPLATE)
TOKENIZERS = {"bytes": BYTES, "bytes without start": byte_level(adds_bos=False), "metaspace": metaspace()}
REVERSE = Example("Reverse the text.", "abc", ("cba", "CBA"))


def text_of(ids, tokenizer=BYTES):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_training_sees_the_very_prompt_of_generation_and_then_the_answer(tokenizer, template):
    encoded = encode(REVERSE, tokenizer, template, max_length=200, answer_index=1)
    prompt = encode_prompt(REVERSE, tokenizer, template, max_prompt_length=150)
    assert list(encoded.input_ids[: len(prompt)]) == prompt
    assert list(encoded.labels[: len(prompt)]) == [-100] * len(prompt)
    assert encoded.labels[len(prompt) :] == encoded.input_ids[len(prompt) :]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(encoded.input_ids[len(prompt) : -1]) == "CBA"
    assert not encoded.truncated


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_prompt_has_the_tokens_the_tokenizer_itself_gives_the_text(name):
    tokenizer = TOKENIZERS[name]
    prompt = encode_prompt(REVERSE, tokenizer, "alpaca", 200)
    assert prompt == tokenizer(render(REVERSE, tokenizer, "alpaca").text)["input_ids"]
    assert (prompt[0] == tokenizer.bos_token_id) == (name != "bytes without start")


def test_a_chat_prompt_has_the_tokens_of_the_chat_template_and_one_start():
    prompt = encode_prompt(REVERSE, BYTES, "chat", 200)
    messages = [{"role": "user", "content": "Reverse the text.\n\nabc"}]
    expected = BYTES.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == expected
    assert prompt.count(BYTES.bos_token_id) == 1


def test_the_loss_can_look_at_the_prompt_too():
    encoded = encode(REVERSE, BYTES, "alpaca", 200, loss_on="all")
    assert encoded.labels == encoded.input_ids


def test_special_tokens_in_data_stay_text():
    example = Example("Repeat </s>.", "<s>", ("</s> again",))
    ids = encode(example, BYTES, "alpaca", 200).input_ids
    assert ids.count(BYTES.eos_token_id) == 1
    assert ids.count(BYTES.bos_token_id) == 1
    assert text_of(ids).endswith("### Response:\n</s> again</s>")


def test_the_input_is_cut_in_its_middle_before_anything_else():
    example = Example("Find the answer.", "S" + "x" * 300 + "E", ("yes",))
    encoded = encode(example, BYTES, "alpaca", 120)
    text = text_of(encoded.input_ids)
    assert encoded.truncated
    assert len(encoded.input_ids) == 120
    assert text.startswith("<s>### Instruction:\nFind the answer.\n\n### Input:\nSxx")
    assert text.endswith("xxE\n\n### Response:\nyes</s>")


def test_a_long_instruction_loses_its_end_and_leaves_a_quarter_to_the_input():
    example = Example("H" + "i" * 300, "S" + "x" * 300 + "E", ("yes",))
    text = text_of(encode(example, BYTES, "alpaca", 150).input_ids)
    fixed = len("### Instruction:\n\n\n### Input:\n\n\n### Response:\nyes") + 2
    assert "\nHiii" in text
    assert text.count("x") + 2 == (150 - fixed) // 4
    assert text.endswith("E\n\n### Response:\nyes</s>")


def test_a_long_answer_keeps_at_least_half_of_the_window():
    example = Example("Go on.", "x" * 300, ("y" * 500,))
    encoded = encode(example, BYTES, "alpaca", 200)
    answer = [label for label in encoded.labels if label != -100]
    assert len(encoded.input_ids) == 200
    assert len(answer) == 100
    assert answer[-1] == BYTES.eos_token_id
    assert encoded.truncated
    # What a short prompt leaves over goes to the answer.
    short = encode(Example("Go on.", "", ("y" * 500,)), BYTES, "alpaca", 200)
    assert len(short.input_ids) == 200
    assert text_of(short.input_ids).count("y") > 100


def test_the_oldest_turns_go_first_and_the_system_turn_last():
    history = (("system", "Rule."), ("user", "a" * 90), ("assistant", "b" * 90), ("user", "cc"), ("assistant", "dd"))
    example = Example("Now?", "", ("yes",), history=history)
    text = text_of(encode_prompt(example, BYTES, "chat", 120))
    assert text == "<s><|system|>Rule.</s><|user|>cc</s><|assistant|>dd</s><|user|>Now?</s><|assistant|>"


def test_the_result_of_a_tool_is_cut_and_what_led_to_it_stays():
    turns = (("system", "Rule."), ("user", "q"), ("assistant", "call"), ("tool", "S" + "x" * 200 + "E"))
    older = (turns[0], ("user", "o" * 50), ("assistant", "p"), *turns[1:])
    for template in ("chat", "alpaca", "plain"):
        ids = encode_prompt(Example("", "", ("a",), older), BYTES, template, 140)
        assert len(ids) == 140 and ids == encode_prompt(Example("", "", ("a",), turns), BYTES, template, 140)
        text = text_of(ids)
        assert "Rule." in text and "call" in text and "Sx" in text and "xE" in text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["alpaca", "plain"])
@given(
    instruction=st.text("ab c\n", max_size=120),
    text=st.text("xy é€\n", max_size=120),
    answer=st.text("yn é", max_size=120),
    max_length=st.integers(100, 260),
)
@settings(max_examples=30, deadline=None)
def test_nothing_is_longer_than_the_window_and_the_answer_is_never_lost(
    name, template, instruction, text, answer, max_length
):
    tokenizer = TOKENIZERS[name]
    example = Example(instruction, text, (answer,))
    encoded = encode(example, tokenizer, template, max_length)
    prompt = encode_prompt(example, tokenizer, template, 10_000)
    whole_answer = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    kept = [label for label in encoded.labels if label != -100]
    assert len(encoded.input_ids) == len(encoded.labels) <= max_length
    assert encoded.truncated == (len(prompt) + len(whole_answer) > max_length)
    assert kept[:-1] == whole_answer[: len(kept) - 1]
    assert len(kept) >= min(len(whole_answer), max_length // 2)
    if not encoded.truncated:
        assert list(encoded.input_ids) == prompt + whole_answer


@pytest.mark.parametrize("template", ["alpaca", "chat", "plain"])
def test_many_at_once_are_the_same_as_one_by_one(template):
    examples = [Example(f"Do {n}.", "x" * n * 3, (f"answer {n}", "other")) for n in range(40)]
    picks = [n % 2 for n in range(40)]
    one_by_one = [
        encode(example, BYTES, template, 120, answer_index=pick) for example, pick in zip(examples, picks, strict=True)
    ]
    assert encode_many(examples, BYTES, template, 120, answer_indices=picks) == one_by_one
    assert encode_prompts(examples, BYTES, template, 120) == [encode_prompt(e, BYTES, template, 120) for e in examples]
    assert encode_many([], BYTES, template, 120) == []


def test_a_window_smaller_than_the_template_is_refused():
    with pytest.raises(PromptError, match=r"its template alone needs more; raise data.max_length"):
        encode_prompt(REVERSE, BYTES, "alpaca", 20)


def test_the_first_token_is_predicted_from_nothing_and_does_not_count():
    assert num_labels((IGNORED, IGNORED, 5, 6)) == 2
    assert num_labels((4, 5, 6)) == 2
    assert num_labels(()) == 0


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(PromptError, match="must have an end-of-sequence token"):
        encode(REVERSE, byte_level({}, adds_bos=False), "alpaca", 100)


@pytest.mark.parametrize(("index", "got"), [(2, "got 2"), (-1, "got -1")])
def test_an_answer_that_is_not_there_is_refused(index, got):
    with pytest.raises(PromptError, match=rf"the answer index of example 0 must be in 0..1.*{got}"):
        encode(REVERSE, BYTES, "alpaca", 100, answer_index=index)
    with pytest.raises(PromptError, match="one answer per example; got 1 for 2 examples"):
        encode_many([REVERSE, REVERSE], BYTES, "alpaca", 100, answer_indices=[0])


def test_batches_are_filled_with_the_padding_token_or_else_with_the_end():
    assert padding_token(byte_level(SPECIAL | {"pad_token": "<pad>"})) == 2
    assert padding_token(BYTES) == BYTES.eos_token_id
    with pytest.raises(PromptError, match="padding or an end-of-sequence token"):
        padding_token(byte_level({}, adds_bos=False))


@pytest.mark.skipif(
    not (SHARED / "data" / "models" / "stories260K").is_dir(),
    reason="needs data/models/stories260K; set FLEXLORA_SHARED to the folder that holds data/",
)
def test_the_tokenizer_of_stories_works_with_every_template_it_can():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data" / "models" / "stories260K")
    for template in ("alpaca", "plain"):
        encoded = encode(REVERSE, tokenizer, template, 128)
        assert encoded.input_ids[0] == tokenizer.bos_token_id
        assert encoded.input_ids.count(tokenizer.eos_token_id) == 1
        assert "cba" in tokenizer.decode([token for token in encoded.labels if token >= 0])
    with pytest.raises(PromptError, match=r"data.template"):
        encode(REVERSE, tokenizer, "chat", 128)
