import copy
import gc
from weakref import ref

import torch

from flexlora.training.group_decoder import decoder_of


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
