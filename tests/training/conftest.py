"""A model whose greedy answers differ."""

import pytest

from flexlora.federation.messages import Broadcast
from flexlora.training.base_model import target_modules


@pytest.fixture
def shapes(make_network):
    return target_modules(make_network(), "all-linear")


@pytest.fixture
def talkative(model, shapes, random_adapter, scaling):
    """A model with something to say: the adapter makes its greedy answers differ."""
    model.load(Broadcast(random_adapter(shapes, {path: 3 for path in shapes}, scaling, seed=4)))
    return model
