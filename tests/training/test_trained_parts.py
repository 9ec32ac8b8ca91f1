"""One client trains cores, chosen entries and added terms as plain autograd on dense changes would."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from flexlora.federation.known_rows import mask_of
from flexlora.federation.messages import Broadcast, SparseMask, TailPenalty
from flexlora.lora.factors import LoraFactors
from flexlora.training.base_model import target_modules
from flexlora.training.one_client import LocalTraining, step_batches, train_client

SGD = LocalTraining("sgd", batch_size=3, momentum=0.9, weight_decay=0.01, num_epochs=2.0)
ADAMW = LocalTraining("adamw", batch_size=3, weight_decay=0.1, num_epochs=2.0)
SEED = 5


@pytest.fixture
def plain(make_network):
    """A base that nobody has put layers into, in float64."""
    return make_network().double()


@pytest.fixture
def shapes(make_network):
    return dict(list(target_modules(make_network(), "all-linear").items())[:5])


@pytest.fixture
def adapter(shapes, random_adapter, scaling):
    wild = random_adapter(shapes, {path: 2 + index % 3 for index, path in enumerate(shapes)}, scaling)
    return {path: LoraFactors(0.3 * own.A, 0.3 * own.B, own.scaling) for path, own in wild.items()}


def by_autograd(plain, broadcast, examples, settings, learning_rate, added):
    """Return the trained A, B and cores: dense weights, autograd and stock optimisers, all in float64.

    Args:
        added: Of (A, B, core) per module, the terms that are added to the loss.
    """
    parts, trained = {}, []
    for path, own in sorted(broadcast.trainable.items()):
        core = (broadcast.cores or {}).get(path, torch.eye(own.rank))
        parts[path] = [tensor.double().clone() for tensor in (own.A, own.B, core)]
        wanted = {"both": (0, 1), "A": (0,), "B": (1,), "core": (2,)}[broadcast.train_factors]
        trained += [parts[path][index].requires_grad_() for index in wanted]
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    more = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
    optimizer = kind(trained, learning_rate, weight_decay=settings.weight_decay, **more)
    weights = dict(plain.named_parameters())

    def changed():
        new = {}
        for path, (A, B, core) in parts.items():
            own = broadcast.trainable[path]
            if broadcast.mask is not None:
                B = B * mask_of(broadcast.mask, path, tuple(B.shape))
            new[f"{path}.weight"] = weights[f"{path}.weight"] + own.scaling * B @ core @ A
        return new

    for batch in step_batches(examples, settings, np.random.default_rng(SEED)):
        dense, loss, count = changed(), 0.0, 0
        for example in batch:
            logits = functional_call(plain, dense, (torch.tensor([example.input_ids]),)).logits[0, :-1]
            labels = torch.tensor(example.labels[1:])
            loss = loss + functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        optimizer.zero_grad()
        (loss / count + added(parts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
    return {path: [one.detach() for one in own] for path, own in parts.items()}


def nothing(parts):
    return 0.0


def assert_trained(model, broadcast, examples, settings, expected, tolerance=2e-4):
    trained, _ = train_client(model, broadcast, examples, settings, 5e-3, SEED)
    cores = model.read_cores()
    moved = 0.0
    for path, (A, B, core) in expected.items():
        own = broadcast.trainable[path]
        torch.testing.assert_close(trained[path].A.double(), A, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(trained[path].B.double(), B, rtol=tolerance, atol=tolerance)
        if cores is not None:
            torch.testing.assert_close(cores[path].double(), core, rtol=tolerance, atol=tolerance)
            assert torch.equal(trained[path].A, own.A) and torch.equal(trained[path].B, own.B)
        start = torch.eye(own.rank) if broadcast.cores is None else broadcast.cores[path]
        moved = max(moved, *(float((a - b).abs().max()) for a, b in ((A, own.A), (B, own.B), (core, start))))
    assert moved > 20 * tolerance
    return trained, cores


def cores_of(adapter):
    rng = torch.Generator().manual_seed(3)
    return {path: torch.randn(own.rank, own.rank, generator=rng) for path, own in adapter.items()}


by_optimizer = pytest.mark.parametrize("settings", [SGD, ADAMW], ids=["sgd", "adamw"])


@by_optimizer
@pytest.mark.parametrize("proximal", [0.0, 2.0])
def test_a_core_trains_as_autograd_between_dense_factors(model, plain, adapter, make_examples, settings, proximal):
    settings = dataclasses.replace(settings, proximal=proximal)
    broadcast = Broadcast(adapter, train_factors="core", cores=cores_of(adapter))

    def added(parts):
        return sum(
            proximal / 2 * (adapter[path].scaling * B @ (core - broadcast.cores[path]) @ A).square().sum()
            for path, (A, B, core) in parts.items()
        )

    examples = make_examples(7)
    expected = by_autograd(plain, broadcast, examples, settings, 5e-3, added)
    assert_trained(model, broadcast, examples, settings, expected)


@by_optimizer
def test_only_chosen_entries_of_a_dense_change_train(model, plain, shapes, make_examples, settings):
    mask = SparseMask(0.2, 9)
    sparse = {path: LoraFactors(torch.eye(shape[1]), torch.zeros(shape), 1.0) for path, shape in shapes.items()}
    broadcast = Broadcast(sparse, train_factors="B", known_A="identity", mask=mask)
    examples = make_examples(7)
    expected = by_autograd(plain, broadcast, examples, settings, 5e-3, nothing)
    trained, _ = assert_trained(model, broadcast, examples, settings, expected)
    for path, own in trained.items():
        chosen = mask_of(mask, path, tuple(own.B.shape))
        assert not own.B[~chosen].any() and own.B[chosen].all()


@by_optimizer
@pytest.mark.parametrize("train_factors", ["both", "A", "B"])
def test_a_tail_penalty_is_part_of_the_loss(model, plain, adapter, make_examples, settings, train_factors):
    broadcast = Broadcast(adapter, train_factors=train_factors, tail_penalty=TailPenalty(0.5, 0.5))

    def added(parts):
        return sum(
            0.5 * torch.linalg.matrix_norm(B[:, B.shape[1] // 2 :]) * torch.linalg.matrix_norm(A[A.shape[0] // 2 :])
            for A, B, _ in parts.values()
        )

    examples = make_examples(7)
    expected = by_autograd(plain, broadcast, examples, settings, 5e-3, added)
    assert_trained(model, broadcast, examples, settings, expected)


@by_optimizer
@pytest.mark.parametrize("train_factors", ["both", "A", "B"])
def test_the_proximal_term_is_part_of_the_loss(model, plain, adapter, make_examples, settings, train_factors):
    settings, broadcast = dataclasses.replace(settings, proximal=3.0), Broadcast(adapter, train_factors=train_factors)

    def added(parts):
        return sum(
            1.5 * (adapter[path].scaling * (B @ A - adapter[path].B.double() @ adapter[path].A.double())).square().sum()
            for path, (A, B, _) in parts.items()
        )

    examples = make_examples(7)
    expected = by_autograd(plain, broadcast, examples, settings, 5e-3, added)
    assert_trained(model, broadcast, examples, settings, expected)


def test_a_large_proximal_weight_holds_the_change_where_it_was(model, adapter, make_examples):
    settings = LocalTraining("sgd", batch_size=3, num_epochs=4.0, max_grad_norm=None)
    moved = []
    for proximal in (0.0, 30.0):
        weighed = dataclasses.replace(settings, proximal=proximal)
        trained, _ = train_client(model, Broadcast(adapter), make_examples(7), weighed, 1e-3, SEED)
        moved.append(sum(float((own.delta() - adapter[path].delta()).norm()) for path, own in trained.items()))
    assert moved[1] < 0.8 * moved[0]


def test_a_loaded_core_changes_what_the_model_computes_and_nothing_is_left_of_it(model, adapter):
    broadcast = Broadcast(adapter, train_factors="core", cores=cores_of(adapter))
    folded = {path: own.with_core(broadcast.cores[path]) for path, own in adapter.items()}
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model.load(broadcast)
        found = model.network(tokens).logits
        model.load(Broadcast(folded))
        torch.testing.assert_close(found, model.network(tokens).logits)
        assert model.read_cores() is None and not model.cores
        model.load(Broadcast(adapter))
        assert not torch.allclose(found, model.network(tokens).logits)
