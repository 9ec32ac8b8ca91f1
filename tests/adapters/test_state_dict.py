"""PEFT state dicts, against those of stock PEFT."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from flexlora.adapters.peft_format import AdapterError
from flexlora.adapters.state_dict import adapter_of, state_dict_of
from flexlora.lora.factors import Scaling

RULE = Scaling("constant_alpha", 6.0)


def state_dict() -> dict[str, torch.Tensor]:
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 7, bias=False))
    model = get_peft_model(net, LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1"]))
    return get_peft_model_state_dict(model)


def test_the_state_dict_of_peft_comes_back_as_it_was() -> None:
    stock = state_dict()
    adapter = adapter_of(stock, RULE)
    assert {module: (own.shape, own.rank, own.scaling) for module, own in adapter.items()} == {
        "0": ((5, 6), 3, 2.0),
        "1": ((7, 5), 3, 2.0),
    }
    found = state_dict_of(adapter)
    assert found.keys() == stock.keys() and all(torch.equal(found[key], stock[key]) for key in stock)


def test_factors_of_another_type_are_written_in_float32_without_gradient() -> None:
    adapter = adapter_of({key: value.bfloat16().requires_grad_() for key, value in state_dict().items()}, RULE)
    for value in state_dict_of(adapter).values():
        assert value.dtype == torch.float32 and value.is_contiguous() and not value.requires_grad


A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({A: None}, "needs A"),
        ({A: torch.zeros(0, 6), B: torch.zeros(5, 0)}, "needs A"),
        ({B: torch.zeros(5, 2)}, "needs A"),
        ({A: torch.zeros(3)}, "matrix of floats"),
        ({A: torch.zeros(3, 6, dtype=torch.int64)}, "matrix of floats"),
        ({"base_model.model.0.lora_A.default.weight": torch.zeros(3, 6)}, "once"),
        ({"base_model.model.0.lora_magnitude_vector": torch.zeros(5)}, "nothing else; got .*lora_magnitude_vector"),
        ({7: torch.zeros(3, 6)}, "nothing else; got 7"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(change: dict[Any, Any], reason: str) -> None:
    changed = {key: value for key, value in {**state_dict(), **change}.items() if value is not None}
    with pytest.raises(AdapterError, match=reason):
        adapter_of(changed, RULE)


def test_an_empty_state_dict_is_refused() -> None:
    with pytest.raises(AdapterError, match="empty"):
        adapter_of({}, RULE)
