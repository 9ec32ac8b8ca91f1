import pytest
import torch

from flexlora.training.snapshot import NetworkSnapshot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_value_that_changes_is_found_but_those_of_trained_parameters(make_network, dtype):
    network = make_network(dtype)
    trained, other = network.model.norm.weight, network.model.layers[0].mlp.up_proj.weight
    snapshot = NetworkSnapshot(network, [trained])
    with torch.no_grad():
        trained += 1
        assert snapshot.overwritten() == []
        other[0, 0] += 0.25
    assert snapshot.overwritten() == ["model.layers.0.mlp.up_proj.weight"]


def test_parameters_that_were_moved_or_cast_are_where_they_were_without_a_copy(network):
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in network.named_parameters()}
    snapshot = NetworkSnapshot(network, [])
    network.to(torch.float64)
    network.lm_head = torch.nn.Linear(2, 2)
    assert snapshot.overwritten() == []
    snapshot.restore()
    after = {name: (parameter, parameter.data_ptr()) for name, parameter in network.named_parameters()}
    assert after.keys() == before.keys()
    assert all(after[name][0] is parameter and after[name][1] == place for name, (parameter, place) in before.items())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
