import pytest
import torch

from flexlora.data.examples import Example
from flexlora.data.prompts import encode_prompt
from flexlora.training.generation import generate, generate_answers

EOS = 2
EXAMPLE = Example("Say something.", "now", ("x",))


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]


def stock_generation(network, prompt, max_new_tokens):
    """Greedy decoding by transformers of one prompt, without padding."""
    tokens = network.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )[0, len(prompt) :].tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


def end_often(network, prompts, max_new_tokens):
    """Make a frequent token of the answers the end of sequence, so that rows end at different steps."""
    network.generation_config.eos_token_id = None
    answers = [stock_generation(network, prompt, max_new_tokens) for prompt in prompts]
    middle = [token for answer in answers for token in answer[2 : max_new_tokens // 2]]
    return max(sorted(set(middle)), key=middle.count)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_decoding_equals_greedy_generation_of_transformers(talkative, batch_size):
    prompts = prompts_of([3, 40, 17, 8, 8, 25, 31, 4, 12])
    expected = [stock_generation(talkative.network, prompt, 12) for prompt in prompts]
    assert generate(talkative, prompts, 12, batch_size) == expected
    assert len(set(map(tuple, expected))) > 5


def test_rows_that_end_leave_and_the_others_go_on_unchanged(talkative):
    prompts = prompts_of([3, 40, 17, 8, 8, 25, 31, 4, 12], seed=1)
    end = end_often(talkative.network, prompts, 12)
    whole = [stock_generation(talkative.network, prompt, 12) for prompt in prompts]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in whole]
    assert len({len(answer) for answer in expected}) > 2
    talkative.network.generation_config.eos_token_id = [end, EOS]
    assert generate(talkative, prompts, 12) == expected


def test_sampling_settings_of_the_model_do_not_matter(talkative):
    prompts = prompts_of([5, 9])
    expected = generate(talkative, prompts, 8)
    talkative.network.generation_config.repetition_penalty = 5.0
    talkative.network.generation_config.do_sample = True
    assert generate(talkative, prompts, 8) == expected


def test_no_prompts_and_no_room_give_empty_answers(talkative):
    assert generate(talkative, [], 8) == []
    assert generate(talkative, prompts_of([3, 4]), 0) == [[], []]


def test_an_answer_ends_where_the_chat_template_ends_a_turn(talkative, monkeypatch):
    prompt = encode_prompt(EXAMPLE, talkative.tokenizer, "plain", 100)
    (whole,) = generate(talkative, [prompt], 12)
    end = next(token for token in whole[2:] if token not in whole[:2])
    assert generate(talkative, [prompt], 12, further_ends=[end]) == [whole[: whole.index(end)]]
    asked = []
    monkeypatch.setattr(
        "flexlora.training.generation.end_token", lambda tokenizer, template: asked.append(template) or end
    )
    (answer,) = generate_answers(talkative, [EXAMPLE], "plain", 200, 12)
    assert asked == ["plain"]
    assert answer == str(talkative.tokenizer.decode(whole[: whole.index(end)], skip_special_tokens=True)).rstrip()
