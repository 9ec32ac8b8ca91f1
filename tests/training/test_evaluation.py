from typing import Any

import pytest
import torch
from rouge_score import rouge_scorer

from flexlora.data.examples import Example
from flexlora.data.prompts import encode, encode_prompt
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.evaluation import Score, answer_tasks, combine, score_of, task_loss
from flexlora.training.generation import generate

TASKS = {
    "colours": [
        Example("Name the colour.", "snow", ("white",)),
        Example("Name the colour.", "coal", ("black", "dark")),
    ],
    "none": [],
    "numbers": [Example("Add.", "1 and 1 " * 30, ("2", "two"))],
}
OPTIONS = {"template": "alpaca", "max_length": 96, "max_new_tokens": 6}


def evaluate(*arguments: Any, **options: Any) -> dict[str, Score]:
    """Return the score of each task that has examples."""
    return {task: score_of(answers) for task, answers in answer_tasks(*arguments, **options).items()}


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


def test_the_loss_without_text_is_the_loss_with_text(talkative, shapes, random_adapter, scaling):
    adapter = Broadcast(random_adapter(shapes, {path: 2 for path in shapes}, scaling))
    whole = combine(list(evaluate(talkative, adapter, TASKS, **OPTIONS).values()))
    assert task_loss(talkative, adapter, TASKS, "alpaca", 96) == pytest.approx(whole.loss, rel=1e-5)
    assert task_loss(talkative, None, {"none": []}, "alpaca", 96) == 0


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


def test_the_answers_are_those_that_scores_are_made_of(talkative, shapes, random_adapter, scaling):
    adapter = Broadcast(random_adapter(shapes, {path: 2 for path in shapes}, scaling))
    answers = answer_tasks(talkative, adapter, TASKS, **OPTIONS)
    scores = evaluate(talkative, adapter, TASKS, **OPTIONS)
    assert {task: len(own) for task, own in answers.items()} == {"colours": 2, "numbers": 1}
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for task, own in answers.items():
        for example, answer in zip(TASKS[task], own, strict=True):
            if answer.text.isascii():
                best = scorer.score_multi(list(example.outputs), answer.text)["rougeL"].fmeasure
                assert answer.rouge_l == pytest.approx(100 * best)
        assert scores[task].rouge_l == pytest.approx(sum(answer.rouge_l for answer in own) / len(own))
        nats, tokens = (sum(getattr(answer, name) for answer in own) for name in ("nats", "num_tokens"))
        assert scores[task].loss == pytest.approx(nats / tokens)
