"""Measures against what is known of them: float64 numpy, the coverage law, and counting by hand."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.contract_client import ran, reply, travelling, with_own_factors
from flexlora.aggregators.fedit import FedIt
from flexlora.aggregators.flexlora import FlexLora
from flexlora.aggregators.measures import axes, floats_down, floats_up
from flexlora.aggregators.zero_pad import ZeroPad
from flexlora.federation.known_rows import mask_of
from flexlora.federation.messages import Broadcast, SparseMask
from flexlora.lora.factors import LoraFactors

RANKS = (2, 2, 4, 8, 8, 16)
SHAPES = {"down": (24, 40), "q": (24, 24)}


def case(method: type, **options: object) -> Case:
    return Case(method, options, shapes=SHAPES, client_ranks=RANKS)


def factors(rank: int = 3, out_features: int = 5, in_features: int = 7, scaling: float = 2.0) -> LoraFactors:
    rng = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(shape, generator=rng) for shape in ((rank, in_features), (out_features, rank)))
    return LoraFactors(A, B, scaling)


def test_the_mean_of_products_has_no_bias_but_that_of_its_rank_and_no_gauge() -> None:
    found = axes(case(FlexLora))
    assert found.bias == pytest.approx(found.least_bias, rel=1e-5)
    assert found.gauge_change is not None and found.gauge_change < 1e-5
    whole = axes(case(FlexLora, error_compensation=True, server_rank=24))
    assert whole.echo_error < 1e-5
    assert whole.change_bias < 1e-5 < whole.bias


def test_an_echo_of_flexlora_loses_what_coverage_says() -> None:
    one = case(FlexLora)
    state = one.after_a_round()
    weights = 10.0 * np.arange(1, 7) / 210
    lost, norm = 0.0, 0.0
    for spectrum in one.aggregator.spectra(state).values():
        coverage = np.array([weights[np.array(RANKS) > j].sum() for j in range(len(spectrum.S))])
        lost += float((((1 - coverage) * spectrum.S.numpy()) ** 2).sum())
        norm += float((spectrum.S.numpy() ** 2).sum())
    assert axes(one).echo_error == pytest.approx((lost / norm) ** 0.5, rel=1e-4)


def test_the_bias_of_fedit_is_the_covariance_of_the_factors() -> None:
    one = case(FedIt)
    state = one.after_a_round()
    updates = one.updates(state, seed=1)
    weights = np.array([update.weight for update in updates]) / 210
    missed, norm = 0.0, 0.0
    for module in SHAPES:
        A = np.stack([update.payload[module].A.double().numpy() for update in updates])
        B = np.stack([update.payload[module].B.double().numpy() for update in updates])
        dA, dB = A - np.tensordot(weights, A, 1), B - np.tensordot(weights, B, 1)
        missed += np.linalg.norm(np.einsum("i,ior,irj->oj", weights, dB, dA)) ** 2
        norm += np.linalg.norm(np.einsum("i,ior,irj->oj", weights, B, A)) ** 2
    assert axes(one).bias == pytest.approx((missed / norm) ** 0.5, rel=1e-4)


def test_padding_has_bias_and_depends_on_gauge() -> None:
    found = axes(case(ZeroPad))
    assert found.bias > 1.1 * found.least_bias
    assert found.gauge_change is not None and found.gauge_change > 0.01
    assert found.floats_up == found.floats_down == pytest.approx(sum(RANKS) / 6 * (24 + 40 + 24 + 24))


def test_numbers_on_the_wire_are_those_that_nobody_else_can_make() -> None:
    whole, frozen = {"m": factors()}, {"m": factors(rank=2)}
    core = {"m": torch.zeros(3, 3)}
    mask = SparseMask(0.4, 0)
    counted = {
        "both": (Broadcast(whole), 36, 36),
        "frozen": (Broadcast(whole, frozen), 60, 36),
        "A": (Broadcast(whole, train_factors="A"), 36, 21),
        "known A": (Broadcast(whole, train_factors="B", known_A=3), 15, 15),
        "kept B": (Broadcast(whole, kept="B"), 36, 21),
        "core": (Broadcast(whole, train_factors="core", cores=core), 45, 9),
        "mask": (Broadcast(whole, train_factors="B", known_A="identity", mask=mask), 6, 6),
    }
    for name, (broadcast, down, up) in counted.items():
        assert (floats_down(broadcast), floats_up(broadcast)) == (down, up), name


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({}, {"A", "B"}),
        ({"train_factors": "A"}, {"A"}),
        ({"train_factors": "B"}, {"B"}),
        ({"kept": "B"}, {"A"}),
        ({"train_factors": "core", "cores": {"m": torch.eye(3)}}, {"core"}),
    ],
    ids=["both", "A", "B", "kept", "core"],
)
def test_the_client_of_the_contract_changes_only_what_it_may_train(fields: dict, changed: set[str]) -> None:
    sent = Broadcast({"m": factors()}, **fields)
    update = reply(sent, "a", 3.0, seed=0)
    assert travelling(sent) == changed
    assert (not torch.equal(update.payload["m"].A, sent.trainable["m"].A)) == ("A" in changed)
    assert (not torch.equal(update.payload["m"].B, sent.trainable["m"].B)) == ("B" in changed)
    assert (update.cores is not None) == ("core" in changed)
    if update.cores is not None:
        assert not torch.equal(update.cores["m"], torch.eye(3))
        assert ran(sent, update).cores is update.cores


def test_the_client_of_the_contract_stays_inside_the_mask_and_runs_what_it_kept() -> None:
    mask = SparseMask(0.4, 0)
    sent = Broadcast({"m": factors()}, train_factors="B", mask=mask)
    moved = reply(sent, "a", 1.0, seed=0).payload["m"].B != sent.trainable["m"].B
    assert torch.equal(moved, mask_of(mask, "m", (5, 3)))
    keeping = Broadcast({"m": factors()}, kept="B")
    own = with_own_factors(keeping).trainable["m"]
    assert torch.equal(own.A, keeping.trainable["m"].A) and not torch.equal(own.B, keeping.trainable["m"].B)
