"""Expected values come from numpy (dense sums, numpy.linalg.svd), in stage 2 from FedIT and FlexLoRA themselves."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.contract_client import reply
from flexlora.aggregators.fedit import FedIt
from flexlora.aggregators.flexlora import FlexLora
from flexlora.aggregators.settings import traits_of
from flexlora.aggregators.slora import SLora, SLoraState
from flexlora.federation.known_rows import mask_of
from flexlora.federation.messages import Update
from flexlora.lora.factors import LoraFactors, Scaling

SHAPES = {"k_proj": (6, 20), "down_proj": (20, 11)}
R = 4
SCALINGS = [Scaling("constant_alpha", 16.0), Scaling("constant_ratio", 2.0), Scaling("rslora", 3.0)]
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 6.0}
every_scaling = pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.policy)
both_stages_two = pytest.mark.parametrize("stage_two", ["fedit", "flexlora"])


def initial(scaling: Scaling = SCALINGS[0], seed: int = 0) -> dict[str, LoraFactors]:
    rng = torch.Generator().manual_seed(seed)
    return {
        m: LoraFactors(torch.randn(R, s[1], generator=rng), torch.zeros(s[0], R), scaling(R)) for m, s in SHAPES.items()
    }


def uniform(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def stage_one(method: SLora, state: SLoraState, ranks: Mapping[str, int] = {m: R for m in SHAPES}) -> list[Update]:
    sent = method.broadcast(state, ranks)
    return [reply(sent, c, w, 10 * state.num_rounds + i) for i, (c, w) in enumerate(WEIGHTS.items())]


def mean_change(updates: list[Update], module: str) -> np.ndarray:
    return sum(u.weight / 10 * u.payload[module].delta().numpy() for u in updates)


def test_stage_one_sends_a_sparse_change_of_whole_weights_over_a_known_identity():
    method = SLora(SCALINGS[0], density=0.25)
    state = method.init(initial())
    state = method.aggregate(state, stage_one(method, state))
    sent = method.broadcast(state, uniform(R))
    assert (sent.train_factors, sent.known_A, sent.mask.density) == ("B", "identity", 0.25)
    for module, (out_features, in_features) in SHAPES.items():
        factors = sent.trainable[module]
        assert factors.scaling == 1.0
        assert torch.equal(factors.A, torch.eye(in_features))
        # What travels: a quarter of the entries, the same for everyone.
        chosen = mask_of(sent.mask, module, (out_features, in_features))
        assert int(chosen.sum()) == round(0.25 * out_features * in_features) == int(factors.B.count_nonzero())
        assert not factors.B[~chosen].any()


def test_by_default_stage_one_trains_as_many_values_as_lora_at_the_servers_rank():
    method = SLora(SCALINGS[0])
    state = method.init(initial())
    in_lora = sum(R * (out_features + in_features) for out_features, in_features in SHAPES.values())
    found = sum(len(values) for values in state.values.values())
    assert abs(found - in_lora) <= len(SHAPES) / 2  # rounded in every module
    small = SLora(SCALINGS[0]).init({"m": LoraFactors(torch.rand(4, 3), torch.zeros(2, 4), 1.0)})
    assert len(small.values["m"]) == 6  # LoRA would have more than the weight itself


def test_the_mask_is_the_same_in_every_round_and_another_for_another_run():
    method = SLora(SCALINGS[0], density=0.3)
    first = method.init(initial())
    later = method.aggregate(first, stage_one(method, first))
    masks = [method.broadcast(state, uniform(R)).mask for state in (first, later, method.init(initial(seed=1)))]
    assert masks[0] == masks[1] != masks[2]


@both_stages_two
def test_the_server_keeps_the_mean_of_the_sparse_changes(stage_two: str):
    method = SLora(SCALINGS[0], density=0.3, stage_two=stage_two)
    state = method.init(initial())
    for _ in range(3):
        updates = stage_one(method, state)
        state = method.aggregate(state, updates)
        for module in SHAPES:
            expected = mean_change(updates, module)
            found = method.broadcast(state, uniform(R)).trainable[module].delta()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(method.spectra(state)[module].delta(), expected, atol=1e-12)


@every_scaling
@both_stages_two
def test_lora_starts_from_the_truncated_decomposition_of_the_sparse_change(stage_two: str, scaling: Scaling):
    method = SLora(scaling, sparse_rounds=2, density=0.3, stage_two=stage_two)
    state = method.init(initial(scaling))
    for _ in range(2):
        updates = stage_one(method, state)
        state = method.aggregate(state, updates)
    for rank in [R] if stage_two == "fedit" else range(1, R + 1):
        sent = method.broadcast(state, uniform(rank))
        assert (sent.train_factors, sent.known_A, sent.mask, sent.frozen) == ("both", None, None, None)
        for module, factors in sent.trainable.items():
            U, S, Vh = np.linalg.svd(mean_change(updates, module))
            expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            np.testing.assert_allclose(factors.delta(), expected, rtol=1e-4, atol=1e-5 * S[0])
            assert method.spectra(state)[module].tail == pytest.approx(np.linalg.norm(S[R:]))
            # B = U S / s and A = Vh, up to signs.
            np.testing.assert_allclose(factors.A.abs(), np.abs(Vh[:rank]), atol=1e-4)
            np.testing.assert_allclose(
                factors.B.abs(), np.abs(U[:, :rank] * S[:rank]) / scaling(rank), atol=1e-4 * S[0]
            )


@both_stages_two
def test_stage_two_is_the_other_method_unchanged(stage_two: str):
    method = SLora(SCALINGS[0], sparse_rounds=1, density=0.3, stage_two=stage_two)
    state = method.init(initial())
    state = method.aggregate(state, stage_one(method, state))
    other = FedIt(SCALINGS[0]) if stage_two == "fedit" else FlexLora(SCALINGS[0])
    plain = other.init(method.broadcast(state, uniform(R)).trainable)
    for seed in (1, 2):
        plans = [uniform(R)] * 2 if stage_two == "fedit" else [uniform(2), uniform(R)]
        updates = [reply(method.broadcast(state, p), str(i), 1.0 + i, 10 * seed + i) for i, p in enumerate(plans)]
        state, plain = method.aggregate(state, updates), other.aggregate(plain, updates)
        for module in SHAPES:
            found = method.broadcast(state, uniform(R)).trainable[module]
            expected = other.broadcast(plain, uniform(R)).trainable[module]
            torch.testing.assert_close(found.delta(), expected.delta(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                method.spectra(state)[module].S, other.spectra(plain)[module].S, rtol=1e-5, atol=1e-6
            )


def test_an_echo_changes_nothing_and_one_client_gets_back_what_it_sent():
    method = SLora(SCALINGS[0], density=0.3, stage_two="flexlora")
    state = method.init(initial())
    payload = reply(method.broadcast(state, uniform(2)), "only", 1.0, 1).payload
    state = method.aggregate(state, [Update("only", payload, 3.0)])
    for _ in range(2):
        sent = method.broadcast(state, uniform(1))
        for module in SHAPES:
            assert torch.equal(sent.trainable[module].B, payload[module].B)
        state = method.aggregate(state, [Update(c, sent.trainable, 2.0) for c in "ab"])


def test_the_order_of_clients_does_not_matter_and_who_lacks_a_module_counts_as_zero_there():
    method = SLora(SCALINGS[0], density=0.3, stage_two="flexlora")
    state = method.init(initial())
    state = method.aggregate(state, stage_one(method, state))
    updates = stage_one(method, state)
    first, again = method.aggregate(state, updates), method.aggregate(state, updates[::-1])
    partial = [*updates, Update("partial", {"k_proj": updates[0].payload["k_proj"]}, 10.0)]
    halved = method.aggregate(state, partial)
    for module in SHAPES:
        torch.testing.assert_close(again.values[module], first.values[module], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(halved.values["down_proj"], first.values["down_proj"] / 2)
    only = method.aggregate(state, [partial[-1]])
    assert torch.equal(only.values["down_proj"], state.values["down_proj"])  # nobody has it: it stays


def test_mixed_ranks_need_flexlora_in_stage_two():
    fedit, flexlora = SLora(SCALINGS[0]), SLora(SCALINGS[0], stage_two="flexlora")
    assert traits_of(fedit).needs_one_rank
    assert not traits_of(flexlora).needs_one_rank
    state = fedit.init(initial())
    with pytest.raises(AggregationError, match="one rank per module"):
        fedit.broadcast(state, uniform(2))
    lacking = Update("odd", {"k_proj": stage_one(fedit, state)[0].payload["k_proj"]}, 1.0)
    with pytest.raises(AggregationError, match="'down_proj'; client 'odd' has 0"):
        fedit.aggregate(state, [lacking])
    flexlora.broadcast(state, uniform(2))


def test_an_update_of_stage_one_must_be_a_change_of_whole_weights():
    method = SLora(SCALINGS[0])
    state = method.init(initial())
    with pytest.raises(AggregationError, match=r"'k_proj', \(6, 20\); got \(6, 4\) from 'a'"):
        method.aggregate(state, [Update("a", initial(), 1.0)])
