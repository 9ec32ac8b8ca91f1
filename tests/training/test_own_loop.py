import dataclasses
import pickle
import random

import numpy as np
import pytest
import torch

from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors
from flexlora.training.base_model import target_modules
from flexlora.training.linear_modules import ModelError
from flexlora.training.logits import answer_losses
from flexlora.training.one_client import (
    DivergedError,
    LocalTraining,
    TrainClient,
    TrainingError,
    train_client,
)
from flexlora.training.own_loop import TrainingSettings, as_train_client

SGD = LocalTraining("sgd", batch_size=8, max_grad_norm=None)


@pytest.fixture
def broadcast(model, random_adapter, scaling):
    shapes = target_modules(model.network, "all-linear")
    ranks = {path: 1 + index % 3 for index, path in enumerate(shapes) if index % 5}
    return Broadcast(random_adapter(shapes, ranks, scaling))


def plain_sgd(model, tokenizer, examples, adapter, settings, seed):
    """One step on all examples, written with nothing but transformers and torch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], settings.learning_rate)
    nats, count = 0.0, 0
    for example in examples:
        labels = torch.tensor([example["labels"]])
        own = int((labels[:, 1:] != -100).sum())
        nats = nats + own * model(input_ids=torch.tensor([example["input_ids"]]), labels=labels).loss
        count += own
    loss = nats / count
    loss.backward()
    optimizer.step()
    return None, {"loss": loss.item(), "steps": 1}


def nothing(model, tokenizer, examples, adapter, settings, seed):
    return adapter, {}


def returning(adapter, metrics=None):
    return as_train_client(lambda *arguments: (adapter, metrics or {}))


def test_one_step_of_a_plain_loop_is_one_step_of_ours(model, broadcast, make_examples):
    examples = make_examples(5)
    expected, measured = train_client(model, broadcast, examples, SGD, 0.01, seed=3)
    adapter, metrics = as_train_client(plain_sgd)(model, broadcast, examples, SGD, 0.01, seed=3)
    assert measured["steps"] == metrics["steps"] == 1
    assert metrics["loss"] == pytest.approx(measured["loss"], abs=1e-6)
    for path, factors in expected.items():
        torch.testing.assert_close(adapter[path].A, factors.A, rtol=0, atol=1e-6)
        torch.testing.assert_close(adapter[path].B, factors.B, rtol=0, atol=1e-6)
    assert any(not torch.equal(adapter[path].B, broadcast.trainable[path].B) for path in adapter)


def test_a_function_sees_exactly_what_the_protocol_promises(model, broadcast, make_examples):
    examples, seen = make_examples(3), {}

    def look(model, tokenizer, examples, adapter, settings, seed):
        seen.update(locals())
        seen.update(draws=(random.random(), float(np.random.rand()), float(torch.rand(()))))
        seen.update(training=model.training, trained={id(p) for p in model.parameters() if p.requires_grad})
        return None, {}

    adapter, _ = as_train_client(look)(model, broadcast, examples, SGD, 0.25, seed=2**40)
    assert seen["model"] is model.network and seen["tokenizer"] is model.tokenizer and seen["training"]
    assert seen["examples"] == [
        {"input_ids": list(e.input_ids), "labels": list(e.labels), "attention_mask": [1] * len(e.labels)}
        for e in examples
    ]
    assert seen["adapter"] == broadcast.trainable and seen["seed"] == 2**40
    assert seen["settings"].learning_rate == 0.25 and seen["settings"].num_steps(100) == SGD.num_steps(100) == 13
    assert seen["trained"] == {id(parameter) for parameter in model.trained_parameters()}
    assert list(adapter) == sorted(broadcast.trainable)
    draws = seen["draws"]
    as_train_client(look)(model, broadcast, examples, SGD, 0.25, seed=2**40)
    assert seen["draws"] == draws


def test_the_settings_are_those_of_local_training_and_the_learning_rate():
    local = [field.name for field in dataclasses.fields(LocalTraining)]
    assert [field.name for field in dataclasses.fields(TrainingSettings)] == ["learning_rate", *local]


def test_global_generators_are_left_as_they_were(model, broadcast, make_examples):
    # Type checks of the tests draw from Python's generator; see test_randomness.
    before = np.random.get_state(), torch.get_rng_state()

    def draw(*arguments):
        random.random(), np.random.rand(), torch.rand(())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        as_train_client(draw)(model, broadcast, make_examples(1), SGD, 0.1, seed=1)
    assert all(np.array_equal(new, old) for new, old in zip(np.random.get_state(), before[0], strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_function_does_to_the_network_is_undone(model, broadcast, make_examples, fails):
    examples = make_examples(2)
    rows, labels = [examples[0].input_ids], [examples[0].labels]
    model.load(broadcast)
    before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    modules, loss = dict(model.network.named_modules()), answer_losses(model, rows, labels, 0).detach()
    flags = {name: parameter.requires_grad for name, parameter in model.network.named_parameters()}
    config = model.network.config.to_dict()

    def vandal(model, *rest):
        model.forward = lambda **inputs: None
        model.config.use_cache = False
        model.generation_config.eos_token_id = 77
        model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
        model.model.layers[0].mlp = torch.nn.Identity()
        model.model.layers[1].self_attn.half()
        for parameter in model.parameters():
            parameter.requires_grad_(True).grad = torch.ones_like(parameter)
        if fails:
            raise RuntimeError("stop")
        return nothing(model, *rest)

    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            as_train_client(vandal)(model, broadcast, examples, SGD, 0.1, seed=1)
    else:
        as_train_client(vandal)(model, broadcast, examples, SGD, 0.1, seed=1)
    assert dict(model.network.named_modules()) == modules
    assert not model.network.training
    assert model.network.config.to_dict() == config
    assert model.network.generation_config.eos_token_id == 2
    after = dict(model.network.named_parameters())
    assert {name: parameter.requires_grad for name, parameter in after.items()} == flags
    assert all(parameter.grad is None for parameter in after.values())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model.load(broadcast)
    assert torch.equal(answer_losses(model, rows, labels, 0), loss)


def test_a_function_that_trains_the_base_is_refused_and_so_is_the_model(model, broadcast, make_examples):
    def train_everything(model, *rest):
        # The fused kernel does not even count up the versions of what it writes to.
        optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), 1e-5, fused=True)
        model(input_ids=torch.tensor([[1, 40, 50]])).logits.sum().backward()
        optimizer.step()
        return None, {}

    with pytest.raises(TrainingError, match=r"leave the weights of the base model.*embed_tokens.*and \d+ more"):
        as_train_client(train_everything)(model, broadcast, make_examples(1), SGD, 0.1, seed=1)
    with pytest.raises(ModelError, match="can no longer be used"):
        model.load(broadcast)


def test_what_comes_back_must_be_an_adapter_like_the_one_received(model, broadcast, make_examples):
    received, path = dict(broadcast.trainable), next(iter(broadcast.trainable))
    first = received[path]
    examples = make_examples(1)

    def train(returned):
        return as_train_client(lambda *arguments: returned)(model, broadcast, examples, SGD, 0.1, seed=1)

    wide, other = first.pad(first.rank + 1), LoraFactors(first.A, first.B, 1.5)
    nan = LoraFactors(first.A, first.B * float("nan"), first.scaling)
    for returned, error, rule in [
        (received, TrainingError, "must return a pair"),
        (([], {}), TrainingError, "the adapter must map modules to LoraFactors, or be None; got list"),
        (({name: own for name, own in received.items() if name != path}, {}), TrainingError, f"{path} is missing"),
        (({**received, "lm_head": first}, {}), TrainingError, "lm_head was not"),
        (({**received, path: first.A}, {}), TrainingError, f"{path}: an adapter must hold LoraFactors; got Tensor"),
        (({**received, path: wide}, {}), TrainingError, f"{path}: factors must keep the shapes A"),
        (({**received, path: other}, {}), TrainingError, f"{path}: factors must keep the scaling"),
        (({**received, path: nan}, {}), DivergedError, f"{path}: trained factors must stay finite"),
        ((received, 0.5), TrainingError, "metrics must map names to numbers; got float"),
        ((received, {"loss": "low"}), TrainingError, "metrics must map names to numbers; loss is str"),
        ((received, {"loss": float("nan")}), DivergedError, "the loss must stay finite; it was nan"),
    ]:
        with pytest.raises(error) as caught:
            train(returned)
        assert rule in str(caught.value)
    adapter, metrics = train((received, {"loss": torch.tensor(0.5), "steps": 3}))
    assert metrics == {"loss": 0.5, "steps": 3.0}
    assert all(torch.equal(adapter[name].A, own.A) and adapter[name].A is not own.A for name, own in received.items())


def test_a_factor_that_the_method_does_not_train_must_come_back_unchanged(model, broadcast, make_examples):
    only_B = dataclasses.replace(broadcast, train_factors="B")
    adapter, _ = as_train_client(plain_sgd)(model, only_B, make_examples(3), SGD, 0.1, seed=1)
    assert all(torch.equal(adapter[path].A, own.A) for path, own in broadcast.trainable.items())
    assert any(not torch.equal(adapter[path].B, own.B) for path, own in broadcast.trainable.items())
    moved = {path: LoraFactors(own.A + 1, own.B, own.scaling) for path, own in broadcast.trainable.items()}
    with pytest.raises(TrainingError, match="trains B only, so A must come back as it was received"):
        returning(moved)(model, only_B, make_examples(3), SGD, 0.1, seed=1)


def test_a_client_without_examples_never_reaches_the_function(model, broadcast):
    with pytest.raises(TrainingError, match="at least one training example"):
        as_train_client(nothing)(model, broadcast, [], SGD, 0.1, seed=1)


def test_engines_take_it_and_processes_can_be_given_it():
    train = as_train_client(nothing)
    assert isinstance(train, TrainClient)
    assert pickle.loads(pickle.dumps(train)).function.__name__ == "nothing"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (3, "seed); got int"),
        (lambda model, tokenizer: None, "<lambda> cannot be called so: too many positional arguments"),
        (lambda a, b, c, d, e, f, g: None, "<lambda> cannot be called so: missing a required argument: 'g'"),
    ],
)
def test_what_cannot_be_called_as_a_training_function_is_refused_at_once(function, words):
    with pytest.raises(TrainingError) as raised:
        as_train_client(function)
    assert words in str(raised.value)
