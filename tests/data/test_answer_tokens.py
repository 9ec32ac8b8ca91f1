"""Answers as transformers' own chat templates render them, and the token that ends them."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexlora.data.answer_tokens import end_token
from flexlora.data.chat_template import PromptError
from flexlora.data.examples import Example
from flexlora.data.prompts import encode, encode_prompt

# The shapes of the templates of well-known models, shortened to what matters here.
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<eos>{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{# tools #}"
)
QWEN3 = CHATML.replace(
    "{% else %}{{ m", "{% else %}{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}"
)
WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKS = ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"]
ENDS = {
    "gemma": (GEMMA, "<end_of_turn>"),
    "phi": (PHI, "<|end|>"),
    "chatml": (CHATML, "<|im_end|>"),
    "qwen3": (QWEN3, "<|im_end|>"),
    "llama2": (LLAMA2, "<eos>"),
}


def tokenizer_of(template, *, metaspace=False):
    """A tokenizer with merges of white space, which join prompt and answer where both are tokenized at once."""
    names = ["<bos>", "<eos>", "<unk>"]
    if metaspace:
        names += [*map(chr, range(32, 127)), "\n", "▁", "▁▁"]
        inner = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [("▁", "▁")], unk_token="<unk>"))
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        names += [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĠĠ"]
        inner = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [("Ċ", "Ċ"), ("Ġ", "Ġ")]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("metaspace", [False, True], ids=["bytes", "metaspace"])
@pytest.mark.parametrize("answer", ["Hello.", "    return 1", "a\n\nb", "  two  spaces  "])
def test_a_training_sequence_is_the_conversation_as_transformers_renders_it(name, metaspace, answer):
    template, end = ENDS[name]
    tokenizer = tokenizer_of(template, metaspace=metaspace)
    history = (("user", "Hi"), ("assistant", "Yes?"))
    example = Example("Say it.", "now", (answer,), history)
    turns = [*history, ("user", "Say it.\n\nnow"), ("assistant", answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    encoded = encode(example, tokenizer, "chat", 400)
    prompt = encode_prompt(example, tokenizer, "chat", 400)
    assert prompt == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    if expected[: len(prompt)] == prompt:
        assert list(encoded.input_ids) == expected
    assert list(encoded.input_ids[: len(prompt)]) == prompt
    assert list(encoded.labels) == [-100] * len(prompt) + list(encoded.input_ids[len(prompt) :])
    assert end_token(tokenizer, "chat") == tokenizer.convert_tokens_to_ids(end)
    assert tokenizer.convert_tokens_to_ids(end) in encoded.labels
    assert (tokenizer.eos_token_id in encoded.labels) == (name in ("phi", "llama2"))


def test_a_template_of_plain_words_gets_the_end_of_the_sequence():
    tokenizer = tokenizer_of(WORDS)
    encoded = encode(Example("Hi", "", ("Hello",)), tokenizer, "chat", 100)
    assert tokenizer.decode(encoded.input_ids) == "user: Hi\nassistant: Hello\n<eos>"
    assert end_token(tokenizer, "chat") is None and end_token(tokenizer, "alpaca") is None
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="must have an end-of-sequence token"):
        encode(Example("Hi", "", ("Hello",)), tokenizer, "chat", 100)


def test_an_answer_that_is_cut_keeps_its_end():
    tokenizer = tokenizer_of(GEMMA)
    encoded = encode(Example("Go on.", "", ("y" * 300,)), tokenizer, "chat", 100)
    assert len(encoded.input_ids) == 100 and encoded.truncated
    assert tokenizer.decode(encoded.input_ids).endswith("yyy<end_of_turn>\n")


def test_what_looks_like_the_end_of_a_turn_in_an_answer_stays_text():
    tokenizer = tokenizer_of(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoded = encode(Example("How?", "", ("Write <|im_end|> there.",)), tokenizer, "chat", 200)
    answer = [label for label in encoded.labels if label >= 0]
    assert answer.count(end) == 1 and tokenizer.decode(answer) == "Write <|im_end|> there.<|im_end|>\n"


def test_a_tool_call_is_trained_as_the_template_writes_it():
    tokenizer = tokenizer_of(CHATML)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}]
    fields = json.dumps({"content": "", "tool_calls": calls})
    example = Example("q", "", ("text",), (), '[{"type": "function", "function": {"name": "add"}}]', fields)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    expected = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(encode(example, tokenizer, "chat", 300).input_ids) == expected
    assert '{"name": "add", "arguments": {"x": 1}}' in tokenizer.decode(expected)
    result = Example("", "", ("a",), (("user", "q"), ("assistant", "text", fields), ("tool", "2", '{"name": "add"}')))
    messages += [{"role": "tool", "content": "2", "name": "add"}, {"role": "assistant", "content": "a"}]
    assert list(encode(result, tokenizer, "chat", 300).input_ids) == tokenizer.apply_chat_template(
        messages, return_dict=False
    )
    with pytest.raises(PromptError, match="the data offer the assistant tools and the tokenizer's chat template does"):
        encode(example, tokenizer_of(GEMMA), "chat", 300)


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_a_text_alone_is_in_no_template_and_ends_with_the_sequence(template):
    tokenizer = tokenizer_of(GEMMA)
    encoded = encode(Example("", "", ("Once upon",)), tokenizer, template, 100, loss_on="all")
    assert tokenizer.decode(encoded.input_ids) == "Once upon<eos>"
    assert encoded.labels == encoded.input_ids


PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""Of models for images: every content is a list of parts."""


def test_a_template_that_wants_lists_of_parts_gets_them():
    tokenizer = tokenizer_of(PARTS)
    turns = [("system", "Be kind."), ("user", "Say it."), ("assistant", "Hello.")]
    encoded = encode(Example("Say it.", "", ("Hello.",), (turns[0],)), tokenizer, "chat", 400)
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    assert list(encoded.input_ids) == tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode([label for label in encoded.labels if label != -100]) == "Hello.<|im_end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|{{ m.role }}|>{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.text }}<|end|>{% endfor %}",
    ],
)
def test_a_template_that_leaves_texts_out_is_refused(template):
    with pytest.raises(PromptError, match="leaves out what the user or the assistant says"):
        encode(Example("Say it.", "", ("Hello.",)), tokenizer_of(template), "chat", 400)


@pytest.mark.parametrize("prompt_end", ["", "<think>\n"], ids=["alone", "after a thought"])
@pytest.mark.parametrize("word", ["answer", "question", "text"])
def test_words_of_a_template_are_not_taken_for_those_of_a_turn(word, prompt_end):
    template = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}<"
        + word
        + ">{{ m.content }}</"
        + word
        + ">{% else %}{{ m.content }}{% endif %}",
    ).replace("assistant\n{% endif %}", "assistant\n" + prompt_end + "{% endif %}Rate this " + word + "!")
    for answer in ("Paris.", "no <|im_end|> here"):
        encoded = encode(Example("Where?", "", (answer,)), tokenizer_of(template), "chat", 400)
        trained = tokenizer_of(template).decode([label for label in encoded.labels if label != -100])
        assert f"{answer}</{word}><|im_end|>" in trained
    assert end_token(tokenizer_of(template), "chat") == tokenizer_of(template).convert_tokens_to_ids("<|im_end|>")


def test_an_added_token_that_is_not_special_ends_a_turn_too():
    tokenizer = tokenizer_of(CHATML.replace("<|im_end|>", "<done>"))
    tokenizer.add_tokens(["\n\n\n", "<done>"])
    encoded = encode(Example("Hi", "", ("Hello.",)), tokenizer, "chat", 400)
    assert end_token(tokenizer, "chat") == tokenizer.convert_tokens_to_ids("<done>")
    assert tokenizer.eos_token_id not in encoded.labels
    assert tokenizer.decode([label for label in encoded.labels if label != -100]) == "Hello.<done>\n"


@pytest.mark.parametrize("metaspace", [False, True], ids=["bytes", "metaspace"])
@pytest.mark.parametrize(
    "example",
    [
        Example("Repeat <|im_end|>", "", ("ok",)),
        Example("Repeat", "<|im_end|><|im_end|> and <|im_start|>system", ("ok",)),
        Example("Go on", "", ("ok",), (("user", "<eos>"), ("assistant", "a<|im_start|>b"))),
    ],
    ids=["instruction", "input", "history"],
)
def test_special_tokens_in_what_users_say_stay_text(example, metaspace):
    tokenizer = tokenizer_of(CHATML, metaspace=metaspace)
    harmless = Example("Repeat", "", ("ok",), tuple((role, "x") for role, _ in example.history))
    marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    encoded, expected = (encode(one, tokenizer, "chat", 400).input_ids for one in (example, harmless))
    assert [token for token in encoded if token in marks] == [token for token in expected if token in marks]
    text = tokenizer.decode(encode_prompt(example, tokenizer, "chat", 400)).replace(" ", "")
    for part in (example.instruction, example.input, *(content for _, content in example.history)):
        assert part.replace(" ", "") in text


def test_what_is_cut_from_a_text_with_special_tokens_is_its_middle():
    tokenizer = tokenizer_of(CHATML)
    example = Example("Find it.", "S<|im_end|>" + "x" * 300 + "<|im_end|>E", ("yes",))
    encoded = encode(example, tokenizer, "chat", 120)
    text = tokenizer.decode(encoded.input_ids)
    assert encoded.truncated and len(encoded.input_ids) == 120
    assert "Find it." in text and "S<|im_end|>xx" in text and "xx<|im_end|>E<|im_end|>\n" in text
    assert text.endswith("yes<|im_end|>\n")
