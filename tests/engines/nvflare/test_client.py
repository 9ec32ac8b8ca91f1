"""The calls of a client's script, on stock PEFT models."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare")

from nvflare.app_common.abstract.fl_model import FLModel
from peft import PeftModel, get_peft_model_state_dict

from flexlora.engines.nvflare.client import FrozenBranch, load_received, reply_of
from flexlora.engines.nvflare.cut import CutRule
from flexlora.engines.nvflare.params import NvflareError
from flexlora.lora.factors import Scaling

Maker = Callable[..., PeftModel]
RULE = CutRule(Scaling("constant_alpha", 6.0))
FOLDING = CutRule(Scaling("constant_alpha", 6.0), folds_tail=True)
X = torch.linspace(-1, 1, 24).reshape(4, 6)


def trained(model: PeftModel, seed: int = 1) -> PeftModel:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += torch.randn(parameter.shape, generator=rng)
    return model


def received(model: PeftModel, rule: CutRule = RULE, **changes: Any) -> FLModel:
    params = {key: value.detach().numpy().copy() for key, value in get_peft_model_state_dict(model).items()}
    return FLModel(params={**params, **changes}, meta={"flexlora": rule.to_meta()})


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_model_takes_the_first_directions_of_what_arrives(make_model: Maker, rank: int) -> None:
    server, client = trained(make_model(4)), make_model(rank)
    load_received(client, received(server))
    for name in ("wide", "tall"):
        whole, part = (one.base_model.model.get_submodule(name) for one in (server, client))
        A, B = (factor["default"].weight.detach().double().numpy() for factor in (whole.lora_A, whole.lora_B))
        delta = part.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta, 1.5 * B[:, :rank] @ A[:rank], rtol=1e-4, atol=1e-5)
        assert part.lora_A["default"].weight.requires_grad and part.lora_B["default"].weight.requires_grad


@pytest.mark.parametrize("rank", [1, 4])
def test_with_a_folded_tail_every_rank_computes_what_the_server_does(make_model: Maker, rank: int) -> None:
    server, client = trained(make_model(4)), make_model(rank)
    load_received(client, received(server, FOLDING))
    torch.testing.assert_close(client(X), server(X), rtol=1e-4, atol=1e-4)
    names = {name for name, parameter in client.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in client.named_parameters() if "lora_" in name}
    with client.disable_adapter(), server.disable_adapter():
        torch.testing.assert_close(client(X), server(X))


def test_the_tail_of_a_round_is_gone_in_the_next(make_model: Maker) -> None:
    server, client = trained(make_model(4)), make_model(2)
    load_received(client, received(server, FOLDING))
    load_received(client, received(trained(server, 2), FOLDING))
    torch.testing.assert_close(client(X), server(X), rtol=1e-4, atol=1e-4)
    load_received(client, received(server))
    hooks = [hook for layer in client.modules() for hook in layer._forward_hooks.values()]
    assert not [hook for hook in hooks if isinstance(hook, FrozenBranch)]


def test_the_tail_passes_gradients_on_and_gets_none(make_model: Maker) -> None:
    server, client = trained(make_model(4)), make_model(1)
    load_received(client, received(server, FOLDING))
    client(X).square().sum().backward()
    own = client.base_model.model.wide.lora_B["default"].weight.grad
    server(X).square().sum().backward()
    # The loss and everything above are the same, so the gradient of a direction is too, up to its scaling.
    whole = server.base_model.model.wide.lora_B["default"].weight.grad
    torch.testing.assert_close(own / 6.0, whole[:, :1] / 1.5, rtol=1e-3, atol=1e-3)


def test_a_reply_has_the_factors_their_scaling_and_the_weight(make_model: Maker) -> None:
    client = make_model(2)
    load_received(client, received(trained(make_model(4))))
    reply = reply_of(trained(client, 3), 17)
    stock = get_peft_model_state_dict(client)
    assert reply.params.keys() == stock.keys()
    for key, value in stock.items():
        assert isinstance(reply.params[key], np.ndarray)
        np.testing.assert_array_equal(reply.params[key], value.detach().numpy())
    before = {key: value.copy() for key, value in reply.params.items()}
    trained(client, 4)
    assert all(np.array_equal(reply.params[key], value) for key, value in before.items())
    assert reply.meta == {"NUM_STEPS_CURRENT_ROUND": 17, "lora_scaling": {"tall": 3.0, "wide": 3.0}}


def test_ranks_may_differ_between_modules(make_model: Maker) -> None:
    server, client = trained(make_model(4)), make_model(2, rank_pattern={"wide": 3})
    load_received(client, received(server, FOLDING))
    torch.testing.assert_close(client(X), server(X), rtol=1e-4, atol=1e-4)
    assert reply_of(client, 1).meta["lora_scaling"] == {"tall": 3.0, "wide": 2.0}


KEY = "base_model.model.wide.lora_A.weight"


@pytest.mark.parametrize(
    ("settings", "rule", "changes", "reason"),
    [
        ({"rank": 5}, RULE, {}, "rank must be in 1..4"),
        ({"rank": 2}, CutRule(RULE.scaling, needs_one_rank=True), {}, "rank must be 4"),
        ({"rank": 2, "lora_alpha": 12}, RULE, {}, "scaling must be 3 at rank 2.*got 6.0"),
        ({"rank": 2, "use_rslora": True}, RULE, {}, "use_rslora"),
        ({"rank": 2, "target_modules": ["wide"]}, RULE, {}, "tall: only the server's adapter"),
        ({"rank": 2, "use_dora": True}, RULE, {}, "must be plain LoRA.*lora_magnitude_vector"),
        ({"rank": 2}, RULE, {KEY: np.full((4, 6), np.nan, np.float32)}, "wide: .*NaN"),
        ({"rank": 2}, RULE, {KEY: np.zeros((4, 8), np.float32)}, "another base model"),
        ({"rank": 2}, RULE, {KEY: torch.zeros(4, 6)}, "FrameworkType.NUMPY"),
        ({"rank": 2}, RULE, {"base_model.model.wide.bias": np.zeros(5)}, "nothing else"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_changes(
    make_model: Maker, settings: dict[str, Any], rule: CutRule, changes: dict[str, Any], reason: str
) -> None:
    client = make_model(**settings)
    before = {key: value.clone() for key, value in client.state_dict().items()}
    with pytest.raises(NvflareError, match=reason):
        load_received(client, received(trained(make_model(4)), rule, **changes))
    assert all(torch.equal(value, before[key]) for key, value in client.state_dict().items())


def test_a_base_without_adapter_and_nothing_received_are_refused(make_model: Maker) -> None:
    with pytest.raises(NvflareError, match="must be a PeftModel"):
        load_received(torch.nn.Linear(2, 2), received(make_model(4)))  # type: ignore[arg-type]
    with pytest.raises(NvflareError, match=r"flare\.receive"):
        load_received(make_model(2), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_examples", [0, -3, 2.5, True, None])
def test_a_reply_needs_examples(make_model: Maker, num_examples: Any) -> None:
    with pytest.raises(NvflareError, match="at least 1"):
        reply_of(make_model(2), num_examples)
