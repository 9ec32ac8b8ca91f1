import copy
import gc
from weakref import ref

import torch

from flexlora.training.adapted_model import AdaptedModel
from flexlora.training.group import train_group
from flexlora.training.group_decoder import decoder_of
from flexlora.training.one_client import LocalTraining


def test_a_written_out_decoder_lasts_as_long_as_its_network_has_its_weights(model):
    network = copy.deepcopy(model.network)
    first = decoder_of(network)
    assert first is not None and decoder_of(network) is first
    layer = network.get_submodule(sorted(first.paths)[0])
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    second = decoder_of(network)
    assert second is not None and second is not first
    gone = ref(network)
    del network, layer
    gc.collect()
    assert gone() is None


def test_a_base_in_bfloat16_is_written_out_with_its_weights_alone_in_that_type(model, jobs):
    """Gradients are those of the rounded weights, nearer than where everything is rounded."""
    settings = LocalTraining("sgd", batch_size=4)
    rounded, exact = copy.deepcopy(model.network).bfloat16(), copy.deepcopy(model.network).bfloat16().float()
    assert decoder_of(rounded) is not None and decoder_of(rounded) is decoder_of(rounded)

    def flat(adapters):
        return torch.cat(
            [factor.flatten() for adapter in adapters for own in adapter.values() for factor in (own.A, own.B)]
        )

    def trained(network):
        return flat(one.adapter for one in train_group(AdaptedModel(network, model.tokenizer), jobs, settings))

    start = flat(dict(sorted(job.broadcast.trainable.items())) for job in jobs)
    expected, found = trained(exact) - start, trained(rounded) - start
    assert float((found - expected).norm() / expected.norm()) < 0.02
