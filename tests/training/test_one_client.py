import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from flexlora.data.prompts import EncodedExample
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.one_client import (
    DivergedError,
    LocalTraining,
    TrainingError,
    cut_by_length,
    step_batches,
    train_client,
)


@pytest.fixture
def broadcast(model, random_adapter, scaling):
    shapes = target_modules(model.network, "all-linear")
    ranks = {path: 1 + index % 3 for index, path in enumerate(shapes) if index % 5}
    return Broadcast(random_adapter(shapes, ranks, scaling))


def plain_training(model, broadcast, batches, settings, learning_rate):
    """The same steps written out with transformers' logits, autograd and stock optimisers, one example at a time."""
    model.load(broadcast)
    parameters = model.trained_parameters()
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            parameters, learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=False
        )
    else:
        optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=settings.weight_decay, foreach=False)
    losses = []
    for batch in batches:
        nats, count = [], 0
        for example in batch:
            logits = model.network(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].float()
            labels = torch.tensor(example.labels[1:])
            nats.append(functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
        loss = torch.stack(nats).sum() / count
        optimizer.zero_grad()
        loss.backward()
        if settings.max_grad_norm is not None:
            norm = torch.stack([parameter.grad.square().sum() for parameter in parameters]).sum().sqrt()
            for parameter in parameters:
                parameter.grad *= min(1.0, settings.max_grad_norm / (float(norm) + 1e-6))
        optimizer.step()
        losses.append(loss.item())
    return model.read(), losses


def assert_close(left, right, tolerance=1e-4):
    assert left.keys() == right.keys()
    for path in left:
        torch.testing.assert_close(left[path].A, right[path].A, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(left[path].B, right[path].B, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        LocalTraining("sgd", batch_size=4, num_epochs=2.0, max_grad_norm=None),
        LocalTraining("sgd", batch_size=2, gradient_accumulation_steps=3, momentum=0.9, weight_decay=0.01),
        LocalTraining("adamw", batch_size=3, gradient_accumulation_steps=2, num_epochs=1.5, weight_decay=0.1),
    ],
    ids=["sgd", "sgd-momentum-accumulated", "adamw"],
)
def test_training_equals_plain_autograd_one_example_at_a_time(model, broadcast, settings, make_examples):
    examples = make_examples(11)
    batches = list(step_batches(examples, settings, np.random.default_rng(5)))
    expected, losses = plain_training(model, broadcast, batches, settings, 0.002)
    trained, metrics = train_client(model, broadcast, examples, settings, 0.002, seed=5)
    assert_close(trained, expected)
    assert metrics["first_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert metrics["steps"] == len(losses) == settings.num_steps(11)


def test_accumulation_changes_how_a_batch_is_computed_and_not_the_result(model, broadcast, make_examples):
    examples = make_examples(12)
    whole, _ = train_client(model, broadcast, examples, LocalTraining("sgd", batch_size=6), 0.1, seed=1)
    parts, _ = train_client(
        model, broadcast, examples, LocalTraining("sgd", batch_size=2, gradient_accumulation_steps=3), 0.1, seed=1
    )
    assert_close(whole, parts)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_gives_the_same_bits_whatever_happened_before(
    network, tokenizer, model, broadcast, dropout, make_examples
):
    model = AdaptedModel(network, tokenizer, dropout=dropout)
    examples, settings = make_examples(10), LocalTraining(batch_size=4, num_epochs=2.0)
    first, metrics = train_client(model, broadcast, examples, settings, 1e-2, seed=3)
    torch.rand(17)
    other, _ = train_client(model, broadcast, examples[:3], settings, 1e-2, seed=4)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, metrics_again = train_client(model, broadcast, examples, settings, 1e-2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics == metrics_again
    for path, factors in first.items():
        assert torch.equal(factors.A, again[path].A)
        assert torch.equal(factors.B, again[path].B)
        assert not torch.equal(factors.B, other[path].B)
    assert not model.network.training


def test_dropout_changes_the_loss(make_network, tokenizer, broadcast, make_examples):
    examples, settings = make_examples(4), LocalTraining("sgd", batch_size=4)
    losses = []
    for dropout in (0.0, 0.5):
        model = AdaptedModel(make_network(), tokenizer, dropout=dropout)
        losses.append(train_client(model, broadcast, examples, settings, 0.1, seed=3)[1]["loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_training_lowers_the_loss_of_what_it_sees(model, broadcast, make_examples):
    settings = LocalTraining(batch_size=4, num_epochs=15.0)
    _, metrics = train_client(model, broadcast, make_examples(4, longest=8), settings, 2e-2, seed=0)
    assert metrics["last_loss"] < 0.7 * metrics["first_loss"]


def test_the_broadcast_is_not_changed_and_frozen_factors_stay(model, broadcast, make_examples):
    before = {path: (factors.A.clone(), factors.B.clone()) for path, factors in broadcast.trainable.items()}
    both = dataclasses.replace(broadcast, frozen=broadcast.trainable, train_factors="B")
    trained, _ = train_client(model, both, make_examples(6), LocalTraining(), 0.1, seed=0)
    for path, (A, B) in before.items():
        assert torch.equal(broadcast.trainable[path].A, A)
        assert torch.equal(broadcast.trainable[path].B, B)
        assert torch.equal(trained[path].A, A)
        assert not torch.equal(trained[path].B, B)


def test_a_bfloat16_base_moves_float32_factors_the_same_way(make_network, tokenizer, scaling, make_examples):
    examples, settings = make_examples(8), LocalTraining("sgd", batch_size=8)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AdaptedModel(make_network(dtype), tokenizer)
        ranks = {path: 2 for path in target_modules(model.network, "all-linear")}
        start = model.initial_adapter(ranks, scaling, seed=0)
        trained, metrics = train_client(model, Broadcast(start), examples, settings, 0.05, seed=0)
        assert {factors.B.dtype for factors in trained.values()} == {torch.float32}
        assert math.isfinite(metrics["grad_norm"])
        moved[dtype] = torch.cat([factors.B.flatten() for factors in trained.values()])
    assert functional.cosine_similarity(moved[torch.float32], moved[torch.bfloat16], dim=0) > 0.98


def test_every_epoch_shows_every_example_once_in_a_new_order(make_examples):
    examples = make_examples(10)
    settings = LocalTraining(batch_size=2, gradient_accumulation_steps=2, num_epochs=2.0)
    steps = list(step_batches(examples, settings, np.random.default_rng(0)))
    assert [len(step) for step in steps] == [4, 4, 2] * 2
    first, second = ([example for step in epoch for example in step] for epoch in (steps[:3], steps[3:]))
    assert first != second
    assert sorted(map(id, first)) == sorted(map(id, second)) == sorted(map(id, examples))


@pytest.mark.parametrize(
    ("num_epochs", "max_steps", "num_steps"),
    [(1.0, None, 5), (0.5, None, 3), (0.01, None, 1), (3.0, None, 15), (3.0, 7, 7)],
)
def test_the_number_of_steps_follows_epochs_and_limit(num_epochs, max_steps, num_steps, make_examples):
    settings = LocalTraining(batch_size=2, num_epochs=num_epochs, max_steps=max_steps)
    assert settings.num_steps(9) == num_steps
    assert len(list(step_batches(make_examples(9), settings, np.random.default_rng(0)))) == num_steps


def test_batches_of_very_different_lengths_are_computed_in_groups():
    examples = [EncodedExample((1,) * length, (1,) * length) for length in (10, 300, 12, 290, 11)]
    groups = [[len(example.input_ids) for example in group] for group in cut_by_length(examples, 8, 96)]
    assert sorted(groups) == [[10, 11, 12], [290, 300]]
    assert len(cut_by_length(examples, 8, 10_000)) == 1
    assert max(map(len, cut_by_length(examples, 2, 10_000))) == 2


def test_metrics_count_tokens_without_padding(model, broadcast, make_examples):
    examples = make_examples(5)
    _, metrics = train_client(model, broadcast, examples, LocalTraining(batch_size=2), 1e-3, seed=0)
    assert metrics["tokens"] == sum(len(example.input_ids) for example in examples)
    assert metrics["answer_tokens"] == sum(label != -100 for example in examples for label in example.labels)


def test_what_cannot_be_trained_is_explained(model, broadcast, make_examples):
    settings = LocalTraining()
    with pytest.raises(TrainingError, match="at least one training example"):
        train_client(model, broadcast, [], settings, 1e-3, seed=0)
    with pytest.raises(TrainingError, match="at least one answer token"):
        train_client(model, broadcast, [EncodedExample((1, 5), (1, -100))], settings, 1e-3, seed=0)
    with pytest.raises(TrainingError, match="at least one adapted module"):
        train_client(model, Broadcast({}), make_examples(2), settings, 1e-3, seed=0)


def test_divergence_is_an_error_that_names_the_step(model, broadcast, make_examples):
    settings = LocalTraining("sgd", batch_size=1, max_grad_norm=None)
    with pytest.raises(DivergedError, match=r"it was nan at step [2-9], lower the learning rate"):
        train_client(model, broadcast, make_examples(9), settings, 1e30, seed=0)
