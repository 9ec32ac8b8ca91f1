import os
from pathlib import Path

import pytest
import torch
from torch import nn

from flexlora.engines import shared_model
from flexlora.engines.shared_model import SharingError, attach
from flexlora.federation.messages import Broadcast
from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.base_model import target_modules
from flexlora.training.logits import answer_losses

ROWS = [[5, 6, 7, 8]]


@pytest.fixture
def share():
    shared = []

    def share_and_remember(model):
        shared.append(shared_model.share(model))
        return shared[-1]

    yield share_and_remember
    for one in shared:
        one.memory.close()


def losses(model):
    with torch.no_grad():
        return answer_losses(model, ROWS, ROWS, 0)


def test_an_attached_model_is_a_twin_in_the_same_memory(model, share):
    before = losses(model)
    shared = share(model)
    twin = attach(shared.memory.fileno(), shared.description, "cpu")
    assert torch.equal(losses(model), before)
    assert torch.equal(losses(twin), before)
    own, of_twin = dict(model.network.named_parameters()), dict(twin.network.named_parameters())
    assert own.keys() == of_twin.keys()
    for name, parameter in own.items():
        assert torch.equal(parameter, of_twin[name]) and not of_twin[name].requires_grad
    assert "flexlora-base" in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_tied_weights_stay_tied_and_are_written_once(model, share):
    shared = share(model)
    twin = attach(shared.memory.fileno(), shared.description, "cpu")
    assert twin.network.get_output_embeddings().weight is twin.network.get_input_embeddings().weight
    assert twin.separate_head is twin.network.get_output_embeddings()
    pages = sum(4096 * -(-4 * parameter.numel() // 4096) for parameter in model.network.parameters())
    assert os.fstat(shared.memory.fileno()).st_size <= pages + 4096 * len(list(model.network.buffers()))


def test_writing_to_a_twin_does_not_change_the_others(model, share):
    before = losses(model)
    shared = share(model)
    twin = attach(shared.memory.fileno(), shared.description, "cpu")
    with torch.no_grad():
        next(twin.network.parameters()).zero_()
    assert torch.equal(losses(model), before)
    assert torch.equal(losses(attach(shared.memory.fileno(), shared.description, "cpu")), before)


def test_factors_that_were_loaded_are_left_alone(model, random_adapter, scaling, share):
    shapes = target_modules(model.network, "all-linear")
    adapter = random_adapter(shapes, dict.fromkeys(shapes, 2), scaling)
    places = {path: factors.A.data_ptr() for path, factors in adapter.items()}
    before = losses(model)
    model.load(Broadcast(adapter))
    shared = share(model)
    assert {path: factors.A.data_ptr() for path, factors in adapter.items()} == places
    assert torch.equal(losses(model), before)
    assert torch.equal(losses(attach(shared.memory.fileno(), shared.description, "cpu")), before)


def test_a_bfloat16_base_is_shared_as_it_is(make_network, tokenizer, share):
    model = AdaptedModel(make_network(torch.bfloat16), tokenizer)
    shared = share(model)
    twin = attach(shared.memory.fileno(), shared.description, "cpu")
    assert twin.network.dtype == torch.bfloat16
    assert torch.equal(losses(twin), losses(model))


def test_models_that_cannot_be_pickled_or_have_special_tensors_are_refused(model, share):
    model.network.odd = lambda: None
    with pytest.raises(SharingError, match="must be picklable"):
        share(model)
    del model.network.odd
    model.network.register_buffer("odd", nn.UninitializedBuffer())
    with pytest.raises(SharingError, match="got UninitializedBuffer"):
        share(model)
