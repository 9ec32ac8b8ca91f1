"""Expected values come from numpy: rows of A averaged by hand over the clients that hold them."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.contract_case import SCALINGS, SERVER_RANK, Case
from flexlora.aggregators.fedsa_lora import FedSaLora
from flexlora.aggregators.settings import traits_of
from flexlora.federation.messages import Update
from flexlora.lora.factors import LoraFactors

CASES = [Case(FedSaLora, {}, scaling) for scaling in SCALINGS]
every_scaling = pytest.mark.parametrize("case", CASES, ids=lambda case: case.scaling.policy)


@every_scaling
def test_each_row_of_a_is_the_mean_of_its_holders(case: Case) -> None:
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    after = case.aggregator.aggregate(state, updates)
    for module, found in after.adapter.items():
        for j in range(SERVER_RANK):
            held = [(u.payload[module], u.weight) for u in updates if u.payload[module].rank > j]
            mean = np.average([f.A[j].double().numpy() for f, _ in held], axis=0, weights=[w for _, w in held])
            np.testing.assert_allclose(found.A[j].numpy(), mean, rtol=1e-12, atol=1e-13)


@every_scaling
def test_there_is_no_global_change_whatever_clients_bring(case: Case) -> None:
    state = case.after_a_round()
    sent = case.aggregator.broadcast(state, case.all_modules(3))
    assert sent.kept == "B" and sent.train_factors == "both" and traits_of(case.aggregator).personal
    assert not any(factors.B.any() for factors in sent.trainable.values())
    assert all(factors.A.any(dim=1).all() for factors in sent.trainable.values())
    assert all(len(spectrum.S) == 0 for spectrum in case.aggregator.spectra(state).values())


def test_the_b_of_a_client_has_no_part_in_the_result() -> None:
    case = CASES[0]
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    # What arrives has the broadcast's zeros where the client keeps its own.
    arrived = [
        Update(
            u.client_id,
            {m: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for m, f in u.payload.items()},
            u.weight,
        )
        for u in updates
    ]
    after, expected = (case.aggregator.aggregate(state, them).adapter for them in (arrived, updates))
    for module, factors in expected.items():
        assert torch.equal(after[module].A, factors.A) and torch.equal(after[module].B, factors.B)


def test_echoes_of_mixed_ranks_change_no_row() -> None:
    case = CASES[0]
    state = case.after_a_round()
    echoes = [
        Update(str(i), case.aggregator.broadcast(state, plan).trainable, 1.0 + i) for i, plan in enumerate(case.plans())
    ]
    after = case.aggregator.aggregate(state, echoes)
    for module, factors in state.adapter.items():
        torch.testing.assert_close(after.adapter[module].A, factors.A, rtol=1e-6, atol=1e-7)


def test_one_client_gets_its_own_a_back() -> None:
    case = CASES[0]
    state = case.start()
    payload = case.updates(state)[2].payload
    after = case.aggregator.aggregate(state, [Update("only", payload, 4.0)])
    for module, factors in case.aggregator.broadcast(after, case.all_modules(SERVER_RANK)).trainable.items():
        assert torch.equal(factors.A, payload[module].A)


def test_a_row_or_module_that_nobody_holds_stays() -> None:
    case = CASES[0]
    state = case.after_a_round()
    only = {"mlp.down_proj": case.updates(state, seed=1)[0].payload["mlp.down_proj"]}
    after = case.aggregator.aggregate(state, [Update("small", only, 2.0)]).adapter
    assert torch.equal(after["attn.q_proj"].A, state.adapter["attn.q_proj"].A)
    assert torch.equal(after["mlp.down_proj"].A[2:], state.adapter["mlp.down_proj"].A[2:])
