"""Parts of one model, against slices and products in numpy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from flexlora.aggregators.aligned import Aligned
from flexlora.aggregators.fedit import FedIt
from flexlora.aggregators.flexlora import FlexLora
from flexlora.aggregators.ra_flora import RaFlora
from flexlora.aggregators.settings import Traits
from flexlora.engines.nvflare.cut import CutRule, check_can_cut, cut
from flexlora.engines.nvflare.params import NvflareError
from flexlora.lora.factors import LoraFactors, Scaling

RULE = Scaling("constant_alpha", 6.0)


def model(seed: int = 0) -> LoraFactors:
    rng = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(4, 6, generator=rng), torch.randn(5, 4, generator=rng), RULE(4))


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_trained_and_frozen_parts_add_up_to_the_model(rank: int) -> None:
    whole = model()
    sent = cut({"wide": whole}, {"wide": rank}, CutRule(RULE, folds_tail=True))
    own = sent.trainable["wide"]
    A, B = whole.A.double().numpy(), whole.B.double().numpy()
    assert own.scaling == 6.0 / rank and torch.equal(own.A, whole.A[:rank])
    np.testing.assert_allclose(own.delta().numpy(), 1.5 * B[:, :rank] @ A[:rank], rtol=1e-5, atol=1e-6)
    tail = sent.frozen["wide"].delta().numpy() if sent.frozen else np.zeros((5, 6))
    np.testing.assert_allclose(own.delta().numpy() + tail, 1.5 * B @ A, rtol=1e-5, atol=1e-6)


def test_nothing_is_frozen_where_the_method_folds_nothing_or_nothing_is_left() -> None:
    whole = model()
    assert cut({"wide": whole}, {"wide": 2}, CutRule(RULE)).frozen is None
    empty = LoraFactors(whole.A, torch.zeros_like(whole.B), whole.scaling)
    assert cut({"wide": empty}, {"wide": 2}, CutRule(RULE, folds_tail=True)).frozen is None


def test_the_rule_comes_back_from_plain_values() -> None:
    rule = CutRule(Scaling("rslora", 16.0), folds_tail=True)
    assert CutRule.from_meta({"flexlora": rule.to_meta()}) == rule


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"scaling": "other", "lora_alpha": 1.0, "folds_tail": True, "needs_one_rank": False},
        {"scaling": ["rslora"], "lora_alpha": 1.0, "folds_tail": True, "needs_one_rank": False},
        {"scaling": "rslora", "lora_alpha": float("inf"), "folds_tail": True, "needs_one_rank": False},
        {"scaling": "rslora", "lora_alpha": 1.0, "folds_tail": 1, "needs_one_rank": False},
        {"scaling": "rslora", "lora_alpha": 1.0, "folds_tail": True},
    ],
)
def test_a_rule_of_another_version_is_refused(told: Any) -> None:
    with pytest.raises(NvflareError, match="no rule of this version"):
        CutRule.from_meta({"flexlora": told})


@pytest.mark.parametrize("meta", [None, {}, {"flexlora": 3}])
def test_a_model_without_a_rule_is_refused(meta: Any) -> None:
    with pytest.raises(NvflareError, match="does the job use FlexLoraAggregator"):
        CutRule.from_meta(meta)


@pytest.mark.parametrize("policy", ["constant_alpha", "constant_ratio", "rslora"])
def test_methods_whose_parts_are_first_directions_are_taken(policy: Any) -> None:
    rule = Scaling(policy, 6.0)
    for method in (FlexLora(rule), FlexLora(rule, fold_tail=True), Aligned(rule), Aligned(rule, split="balanced")):
        check_can_cut(method, "method", rule)
    check_can_cut(FedIt(rule), "fedit", rule)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (FlexLora(RULE, split="balanced"), "not the first directions"),
        (RaFlora(RULE), "not the first directions"),
        (FlexLora(RULE, server_rank=6, fold_tail=True), "holds more than the directions"),
        (FlexLora(RULE, energy=0.9), "lower ranks"),
    ],
)
def test_methods_whose_parts_are_others_are_refused(method: Any, reason: str) -> None:
    with pytest.raises(NvflareError, match=reason):
        check_can_cut(method, "method", RULE)


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        (Traits(personal=True), "keep a part"),
        (Traits(per_client=True), "of its own"),
        (Traits(folds_into_base=True), "base weights"),
        (Traits(sends_both_factors=False), "not both factors"),
        (Traits(takes_own_training=False), "another loss"),
    ],
)
def test_traits_that_need_more_than_one_model_are_refused(traits: Traits, reason: str) -> None:
    @dataclass(frozen=True)
    class Needs:
        traits: Traits

    with pytest.raises(NvflareError, match=f"method 'mine'.*{reason}"):
        check_can_cut(Needs(traits), "mine", RULE)  # type: ignore[arg-type]
