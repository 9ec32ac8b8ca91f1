"""A model whose greedy answers differ, and clients that differ in all ways they can."""

import pytest

from flexlora.federation.messages import Broadcast
from flexlora.lora.factors import LoraFactors, Scaling
from flexlora.training.base_model import target_modules
from flexlora.training.group_passes import GroupJob


@pytest.fixture
def shapes(make_network):
    return target_modules(make_network(), "all-linear")


@pytest.fixture
def talkative(model, shapes, random_adapter, scaling):
    """A model with something to say: the adapter makes its greedy answers differ."""
    model.load(Broadcast(random_adapter(shapes, {path: 3 for path in shapes}, scaling, seed=4)))
    return model


@pytest.fixture
def make_broadcast(model, random_adapter, scaling):
    """Returns a maker of adapters whose ranks go round ``ranks``; 0 leaves a module out."""
    shapes = target_modules(model.network, "all-linear")

    def make(*ranks, seed=0, rule=scaling, frozen=None, train_factors="both"):
        def adapter(ranks, seed):
            resolved = {path: ranks[index % len(ranks)] for index, path in enumerate(shapes)}
            wild = random_adapter(shapes, {path: rank for path, rank in resolved.items() if rank}, rule, seed)
            return {path: LoraFactors(0.3 * own.A, 0.3 * own.B, own.scaling) for path, own in wild.items()}

        return Broadcast(adapter(ranks, seed), adapter(frozen, seed + 1) if frozen else None, train_factors)

    return make


@pytest.fixture
def jobs(make_broadcast, make_examples):
    """Six clients that differ in whatever clients can differ in, at rates that keep a random network from chaos."""
    broadcasts = [
        make_broadcast(3),
        make_broadcast(1, 5, 2, seed=1),
        make_broadcast(4, 0, 2, 1, 0, seed=2),
        make_broadcast(2, seed=3, rule=Scaling("rslora", 3.0)),
        make_broadcast(3, seed=4, rule=Scaling("constant_ratio", 0.5)),
        make_broadcast(16, seed=5),
    ]
    return [
        GroupJob(
            broadcast, make_examples(3 + 2 * index, seed=index, longest=10 + 8 * index), 4e-3 * (1 + index % 3), index
        )
        for index, broadcast in enumerate(broadcasts)
    ]
