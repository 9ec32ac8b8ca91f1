"""Which device a configuration names, and whether a tokenizer fits its base model."""

import copy

import pytest

from flexlora.data.chat_template import PromptError
from flexlora.experiment.base import BaseModelError, check_tokenizer, resolve_device


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(BaseModelError, match=r"model\.device=cuda:99"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == "cpu"


@pytest.fixture
def own(tokenizer):
    """A tokenizer to change; the network has a row for each of its 259 tokens."""
    return copy.deepcopy(tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(network, own):
    check_tokenizer(network, own, "alpaca")
    own.add_tokens(["<new>"])
    with pytest.raises(BaseModelError, match=r"it has 259 rows and the tokenizer has 260 tokens, .*'<new>' \(259\)"):
        check_tokenizer(network, own, "alpaca")
    network.resize_token_embeddings(len(own))
    check_tokenizer(network, own, "alpaca")


def test_special_tokens_without_a_row_are_refused_if_something_writes_them(network, own):
    # As in google/gemma-3-1b-it, whose <image_soft_token> no text becomes.
    own.add_special_tokens({"additional_special_tokens": ["<|unused|>", "<|turn|>"]})
    check_tokenizer(network, own, "alpaca")
    own.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    check_tokenizer(network, own, "alpaca")
    with pytest.raises(BaseModelError, match=r"1 are beyond, such as '<\|turn\|>' \(260\)"):
        check_tokenizer(network, own, "chat")
    own.add_special_tokens({"pad_token": "<|padding|>"})
    with pytest.raises(BaseModelError, match=r"'<\|padding\|>' \(261\)"):
        check_tokenizer(network, own, "alpaca")


def test_a_template_that_the_tokenizer_lacks_is_told_before_any_client_trains(network, own):
    with pytest.raises(PromptError, match=r"data.template=chat needs a tokenizer with a chat template"):
        check_tokenizer(network, own, "chat")
