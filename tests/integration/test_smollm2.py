"""The base path on a real model, SmolLM2-135M-Instruct, against stock transformers and PEFT; needs ``make smollm2``."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flexlora.adapters.write import write_adapter
from flexlora.data.examples import Example
from flexlora.data.prompts import encode_many, padding_token
from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import load_base_model, target_modules
from flexlora.training.generation import generate
from flexlora.training.group_decoder import decoder_of
from flexlora.training.logits import answer_losses

FOLDER = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="make smollm2 has not fetched the model"),
]

QUESTIONS = [
    ("Name the capital of the country.", "France", "Paris"),
    ("Translate into German.", "Good morning", "Guten Morgen"),
    ("Is the sentence positive or negative?", "I loved every minute of it.", "positive"),
    ("Add the numbers.", "17 and 25", "42"),
    ("Write the opposite.", "hot", "cold"),
    ("Answer the question in one sentence.", "Why is the sky blue?", "Because air scatters blue light more than red."),
    ("Sort the words by the alphabet.", "pear apple fig", "apple fig pear"),
    ("Which word does not fit?", "cat dog table horse", "table"),
    ("Count the letters.", "banana", "6"),
    ("Shorten the sentence.", "He went to the shop in order to buy some bread " * 6, "He went to buy bread."),
]


@pytest.fixture(scope="module")
def loaded():
    return {
        dtype: AdaptedModel(*load_base_model(str(FOLDER), dtype=dtype, device="cpu"))
        for dtype in ("float32", "bfloat16")
    }


@pytest.fixture(scope="module")
def encoded(loaded):
    examples = [Example(task, text, (answer,)) for task, text, answer in QUESTIONS]
    return encode_many(examples, loaded["float32"].tokenizer, "chat", 256)


@pytest.fixture(scope="module")
def adapter(loaded):
    """Factors of mixed ranks that change what the model says, but leave it a language model."""
    shapes = target_modules(loaded["float32"].network, "all-linear")
    generator, scaling = torch.Generator().manual_seed(0), Scaling("rslora", 2.0)
    return {
        path: LoraFactors(
            torch.randn(rank, width, generator=generator) * width**-0.5,
            torch.randn(height, rank, generator=generator) * 0.01,
            scaling(rank),
        )
        for number, (path, (height, width)) in enumerate(shapes.items())
        for rank in [(2, 8, 16)[number % 3]]
    }


def losses_of(model, encoded):
    rows, labels = [one.input_ids for one in encoded], [one.labels for one in encoded]
    with torch.no_grad():
        return answer_losses(model, rows, labels, padding_token(model.tokenizer))


def test_losses_are_those_of_stock_transformers_and_peft(loaded, encoded, adapter, tmp_path):
    model = loaded["float32"]
    model.load(Broadcast(adapter))
    found = losses_of(model, encoded)
    write_adapter(tmp_path / "adapter", adapter, str(FOLDER))
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    for one, nats in zip(encoded, found.tolist(), strict=True):
        with torch.no_grad():
            expected = stock(input_ids=torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss
        num_answers = sum(label != -100 for label in one.labels)
        assert nats / num_answers == pytest.approx(float(expected), abs=1e-5)


def test_bfloat16_costs_little(loaded, encoded, adapter):
    found = {}
    for dtype, model in loaded.items():
        model.load(Broadcast(adapter))
        found[dtype] = losses_of(model, encoded)
    exact = found["float32"]
    assert float((found["bfloat16"] - exact).abs().sum() / exact.sum()) < 0.05


def test_both_types_train_written_out(loaded):
    for model in loaded.values():
        with model.without_adapter():
            assert decoder_of(model.network) is not None


def test_answers_are_those_of_greedy_generation_by_transformers(loaded):
    model = loaded["float32"]
    prompts = [
        model.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{task}\n{text}"}], add_generation_prompt=True, return_dict=False
        )
        for task, text, _ in QUESTIONS
    ]
    with model.without_adapter():
        found = generate(model, prompts, 12)
        for prompt, tokens in zip(prompts, found, strict=True):
            with torch.no_grad():
                whole = model.network.generate(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=12,
                    do_sample=False,
                )[0, len(prompt) :].tolist()
            end = model.tokenizer.eos_token_id
            assert tokens == (whole[: whole.index(end)] if end in whole else whole)
