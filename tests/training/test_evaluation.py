import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from flexlora.data.examples import Example
from flexlora.data.prompts import encode, encode_prompt
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.evaluation import Score, combine, evaluate, generate, is_exact_match, rouge_l

EOS = 2
STOCK = RougeScorer(["rougeL"])


@pytest.fixture
def shapes(make_network):
    return target_modules(make_network(), "all-linear")


@pytest.fixture
def talkative(model, shapes, random_adapter, scaling):
    """A model with something to say: the adapter makes its greedy answers differ."""
    model.load(Broadcast(random_adapter(shapes, {path: 3 for path in shapes}, scaling, seed=4)))
    return model


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


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_ascii_text_scores_exactly_as_rouge_score_does(answer, reference):
    expected = STOCK.score(reference, answer)["rougeL"].fmeasure
    if STOCK._tokenizer.tokenize(reference):
        assert rouge_l(answer, [reference]) == expected


def test_rouge_l_of_a_known_pair_is_as_computed_by_hand():
    # Longest common subsequence: the cat on the mat (5 words); 5/6 of the answer, 5/7 of the reference.
    score = rouge_l("The cat lay on the mat.", ["the small cat sat on the mat"])
    assert score == pytest.approx(2 * (5 / 6) * (5 / 7) / (5 / 6 + 5 / 7))


def test_the_best_reference_counts():
    assert rouge_l("a red apple", ["nothing alike", "a red apple", "a green apple"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("猫在垫子上", "猫在垫子上", 1.0),
        ("猫在桌子上", "猫在垫子上", 0.8),
        ("القطة على السجادة", "القطة على الطاولة", 2 / 3),
        ("बिल्ली चटाई पर है", "बिल्ली मेज पर है", 0.75),
        ("Кошка спит", "кошка СПИТ.", 1.0),
        ("año", "ano", 0.0),
        ("แมว", "แมว", 1.0),
        ("ネコは寝る", "ネコは走る", 0.8),
        ("东京 Tower 333", "東京 tower 333", 0.75),
    ],
)
def test_every_script_is_scored_by_its_words(answer, reference, expected):
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


def test_an_answer_of_symbols_only_scores_by_exact_match():
    assert rouge_l(":-)", [":-)"]) == 1.0
    assert rouge_l(":-(", [":-)"]) == 0.0
    assert rouge_l("", ["word"]) == 0.0


def test_exact_match_ignores_case_and_white_space_only():
    assert is_exact_match("  The\n CAT ", ["a dog", "the cat"])
    assert not is_exact_match("the cat.", ["the cat"])
    assert not is_exact_match("", ["the cat"])


TASKS = {
    "colours": [
        Example("Name the colour.", "snow", ("white",)),
        Example("Name the colour.", "coal", ("black", "dark")),
    ],
    "none": [],
    "numbers": [Example("Add.", "1 and 1 " * 30, ("2", "two"))],
}
OPTIONS = {"template": "alpaca", "max_length": 96, "max_new_tokens": 6}


def test_the_loss_is_that_of_transformers_per_answer_token(talkative, tokenizer, shapes, random_adapter, scaling):
    adapter = Broadcast(random_adapter(shapes, {path: 2 for path in list(shapes)[1:5]}, scaling))
    scores = evaluate(talkative, adapter, TASKS, **OPTIONS)
    nats, count = 0.0, 0
    for example in TASKS["colours"]:
        row = encode(example, tokenizer, "alpaca", 96)
        num_labels = sum(label != -100 for label in row.labels)
        with torch.no_grad():
            loss = talkative.network(
                input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])
            ).loss.item()
        nats, count = nats + loss * num_labels, count + num_labels
    assert scores["colours"].loss == pytest.approx(nats / count, rel=1e-5)


def test_tasks_are_scored_apart_and_batches_do_not_matter(talkative):
    together = evaluate(talkative, None, TASKS, **OPTIONS)
    assert list(together) == ["colours", "numbers"]
    assert together["colours"].num_examples == 2
    for task in together:
        alone = evaluate(talkative, None, {task: TASKS[task]}, batch_size=1, **OPTIONS)[task]
        assert alone.loss == pytest.approx(together[task].loss, rel=1e-5)
        assert alone.rouge_l == together[task].rouge_l


def test_no_adapter_means_the_base_alone_whatever_was_loaded(talkative, make_network, tokenizer):
    fresh = AdaptedModel(make_network(), tokenizer)
    assert evaluate(talkative, None, TASKS, **OPTIONS) == evaluate(fresh, None, TASKS, **OPTIONS)


def test_what_the_model_says_is_what_is_scored(talkative, tokenizer, shapes, random_adapter, scaling):
    adapter = Broadcast(random_adapter(shapes, {path: 2 for path in shapes}, scaling, seed=8))
    talkative.load(adapter)
    example = TASKS["colours"][0]
    said = generate(talkative, [encode_prompt(example, tokenizer, "alpaca", 90)], 6)[0]
    text = tokenizer.decode(said, skip_special_tokens=True).strip()
    tasks = {"right": [Example(example.instruction, example.input, ("wrong", text))], "wrong": [example]}
    scores = evaluate(talkative, adapter, tasks, **OPTIONS)
    assert (scores["right"].exact_match, scores["wrong"].exact_match) == (100.0, 0.0)
    assert scores["right"].rouge_l == pytest.approx(100.0)


def test_prompts_at_the_longest_length_leave_room_for_an_answer(talkative):
    tasks = {"long": [Example("Repeat.", "word " * 400, ("word",)), Example("Repeat.", "x", ("x",))]}
    score = evaluate(talkative, None, tasks, template="alpaca", max_length=128, max_new_tokens=100)["long"]
    assert score.num_examples == 2


def test_means_weigh_examples_or_tasks():
    scores = [Score(80.0, 50.0, 1.0, 30, 1), Score(20.0, 0.0, 3.0, 10, 1)]
    assert combine(scores) == Score(65.0, 37.5, 1.5, 40, 2)
    assert combine(scores, weighted=False) == Score(50.0, 25.0, 2.0, 40, 2)
    assert combine([combine(scores), Score(0.0, 0.0, 0.0, 40, 3)]) == Score(32.5, 18.75, 0.75, 80, 5)
    assert combine([]) == Score(0.0, 0.0, 0.0, 0, 0)
