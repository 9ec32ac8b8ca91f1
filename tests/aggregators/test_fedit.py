import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.fedit import FedIt
from flexlora.federation.messages import Update
from flexlora.lora.factors import LoraFactors, Scaling

SCALING = Scaling("constant_alpha", 16.0)


def factors(rank: int, seed: int, scaling: float | None = None) -> LoraFactors:
    rng = torch.Generator().manual_seed(seed)
    return LoraFactors(
        torch.randn(rank, 9, generator=rng), torch.randn(6, rank, generator=rng), scaling or SCALING(rank)
    )


def test_the_average_equals_that_of_stock_peft_state_dicts():
    weights = [1.0, 2.0, 5.0]
    torch.manual_seed(0)  # PEFT initialises from the global stream
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["0", "2"], init_lora_weights=False)
    models = [get_peft_model(nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 9)), config) for _ in weights]
    dicts = [get_peft_model_state_dict(model) for model in models]
    expected = {
        key: sum(weight * d[key].double() for weight, d in zip(weights, dicts, strict=True)) / 8 for key in dicts[0]
    }
    payloads = [
        {
            module: LoraFactors(
                d[f"base_model.model.{module}.lora_A.weight"], d[f"base_model.model.{module}.lora_B.weight"], SCALING(4)
            )
            for module in ("0", "2")
        }
        for d in dicts
    ]
    aggregator = FedIt(scaling=SCALING)
    updates = [Update(str(i), payload, weights[i]) for i, payload in enumerate(payloads)]
    state = aggregator.aggregate(aggregator.init(payloads[0]), updates)
    found = aggregator.broadcast(state, {"0": 4, "2": 4}).trainable
    assert len(expected) == 4
    for module, average in found.items():
        torch.testing.assert_close(average.A, expected[f"base_model.model.{module}.lora_A.weight"].float())
        torch.testing.assert_close(average.B, expected[f"base_model.model.{module}.lora_B.weight"].float())


def test_an_echo_changes_no_bit():
    aggregator = FedIt(scaling=SCALING)
    state = aggregator.init({"m": factors(4, 0)})
    state = aggregator.aggregate(
        state, [Update("a", {"m": factors(4, 1)}, 3.0), Update("b", {"m": factors(4, 2)}, 2.0)]
    )
    sent = aggregator.broadcast(state, {"m": 4}).trainable
    state = aggregator.aggregate(state, [Update("a", sent, 3.0), Update("b", sent, 2.0)])
    again = aggregator.broadcast(state, {"m": 4}).trainable
    assert torch.equal(again["m"].A, sent["m"].A)
    assert torch.equal(again["m"].B, sent["m"].B)


def test_ranks_may_differ_between_modules_but_not_between_clients():
    aggregator = FedIt(scaling=SCALING)
    state = aggregator.init({"a": factors(2, 0), "b": factors(5, 1)})
    aggregator.aggregate(state, [Update("same", {"a": factors(2, 2), "b": factors(5, 3)}, 1.0)])
    with pytest.raises(AggregationError) as failure:
        aggregator.aggregate(state, [Update("odd", {"a": factors(2, 2), "b": factors(3, 3)}, 1.0)])
    for part in ("one rank per module", "5 in 'b'", "'odd' has 3", "clients.distribution", "flexlora"):
        assert part in str(failure.value)
    with pytest.raises(AggregationError, match="the receiving client has 4"):
        aggregator.broadcast(state, {"a": 4, "b": 5})


def test_a_payload_under_another_scaling_counts_as_the_change_it_is():
    aggregator = FedIt(scaling=SCALING)
    update = factors(4, 1, scaling=0.5)
    state = aggregator.aggregate(aggregator.init({"m": factors(4, 0)}), [Update("a", {"m": update}, 1.0)])
    found = aggregator.broadcast(state, {"m": 4}).trainable["m"]
    assert found.scaling == SCALING(4)
    torch.testing.assert_close(found.delta(), update.delta(), rtol=1e-6, atol=1e-6)


def test_the_spectrum_is_the_decomposition_of_the_averaged_product():
    aggregator = FedIt(scaling=SCALING)
    updates = [Update(str(i), {"m": factors(4, i)}, 1.0 + i) for i in range(3)]
    state = aggregator.aggregate(aggregator.init({"m": factors(4, 9)}), updates)
    A = sum(u.weight / 6 * u.payload["m"].A.double().numpy() for u in updates)
    B = sum(u.weight / 6 * u.payload["m"].B.double().numpy() for u in updates)
    W = SCALING(4) * B @ A
    spectrum = aggregator.spectra(state)["m"]
    S = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(spectrum.S.numpy(), S[: len(spectrum.S)], rtol=1e-12)
    np.testing.assert_allclose(spectrum.delta().numpy(), W, atol=1e-12 * S[0])
    assert spectrum.tail < 1e-12 * S[0]  # the product has no more directions than the server keeps
