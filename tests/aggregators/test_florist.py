"""Expected values come from numpy (dense sums, numpy.linalg.svd) or from the methods it must be equal to."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.flexlora import FlexLora
from flexlora.aggregators.flora import Flora
from flexlora.aggregators.florist import Florist
from flexlora.federation.messages import Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.q_proj": (12, 12), "mlp.down_proj": (10, 17), "mlp.up_proj": (17, 10)}
SCALING = Scaling("constant_alpha", 16.0)
SERVER_RANK = 6
COHORT = [(2, 1.0), (4, 3.0), (6, 4.0)]


def adapter(rank: int, seed: int) -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, shape[1], generator=rng), torch.randn(shape[0], rank, generator=rng), SCALING(rank)
        )
        for module, shape in SHAPES.items()
    }


def initial() -> AdapterState:
    return {m: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for m, f in adapter(SERVER_RANK, 99).items()}


def cohort(seed: int) -> list[Update]:
    updates = [Update(str(rank), adapter(rank, 10 * seed + rank), weight) for rank, weight in COHORT]
    del updates[1].payload["mlp.up_proj"]  # type: ignore[attr-defined]
    return updates


def mean_of_products(updates: list[Update], module: str) -> np.ndarray:
    total = np.zeros(SHAPES[module])
    for update in updates:
        if module in update.payload:
            f = update.payload[module]
            total += update.weight * f.scaling * f.B.double().numpy() @ f.A.double().numpy()
    return total / sum(update.weight for update in updates)


def thresholded(W: np.ndarray, tau: float) -> tuple[np.ndarray, int, float]:
    """Return the paper's truncation, its rank, and the norm of the rest."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    p = next(p for p in range(len(S) + 1) if (S[:p] ** 2).sum() >= tau * (S**2).sum())
    return (U[:, :p] * S[:p]) @ Vh[:p], p, float(np.linalg.norm(S[p:]))


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.95])
def test_each_round_folds_the_fewest_directions_with_enough_energy(tau: float):
    aggregator = Florist(scaling=SCALING, tau=tau)
    state, expected = aggregator.init(initial()), {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for server_round in range(3):
        updates = cohort(server_round)
        state = aggregator.aggregate(state, updates)
        for module, spectrum in aggregator.spectra(state).items():
            step, p, rest = thresholded(mean_of_products(updates, module), tau)
            expected[module] += step
            np.testing.assert_allclose(spectrum.delta().numpy(), expected[module], rtol=0, atol=1e-11)
            assert spectrum.tail == pytest.approx(rest, rel=1e-9)
            assert 1 <= p and (server_round > 0 or len(spectrum.S) == p)


def test_at_tau_one_the_model_is_floras_and_first_that_of_flexlora_at_full_rank():
    updates = cohort(0)
    florist, flora = Florist(scaling=SCALING, tau=1.0), Flora(scaling=SCALING)
    flexlora = FlexLora(scaling=SCALING, server_rank=max(max(shape) for shape in SHAPES.values()))
    kept = florist.spectra(florist.aggregate(florist.init(initial()), updates))
    found = [
        kept,
        flora.spectra(flora.aggregate(flora.init(initial()), updates)),
        flexlora.spectra(flexlora.aggregate(flexlora.init(initial()), updates)),
    ]
    for module in SHAPES:
        W = mean_of_products(updates, module)
        for spectra in found:
            np.testing.assert_allclose(spectra[module].delta().numpy(), W, rtol=0, atol=1e-11)
        assert kept[module].tail < 1e-11


def test_at_tau_one_the_smallest_directions_are_kept():
    small = LoraFactors(torch.eye(2, 5, dtype=torch.float64), torch.eye(4, 2, dtype=torch.float64), 1.0)
    small = LoraFactors(small.A, small.B * torch.tensor([1.0, 1e-7], dtype=torch.float64), 1.0)
    aggregator = Florist(scaling=Scaling("constant_ratio", 1.0), tau=1.0)
    state = aggregator.init({"m": LoraFactors(torch.rand(2, 5), torch.zeros(4, 2), 1.0)})
    spectrum = aggregator.spectra(aggregator.aggregate(state, [Update("a", {"m": small}, 1.0)]))["m"]
    np.testing.assert_allclose(spectrum.S.numpy(), [1.0, 1e-7], rtol=1e-6)


def test_clients_start_afresh_and_echoes_change_nothing():
    aggregator = Florist(scaling=SCALING)
    state = aggregator.aggregate(aggregator.init(initial()), cohort(0))
    before = {module: s.delta().numpy() for module, s in aggregator.spectra(state).items()}
    echoes = []
    for rank, weight in COHORT:
        sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, rank))
        for module, factors in sent.trainable.items():
            assert torch.equal(factors.A, initial()[module].A[:rank]) and not factors.B.any()
        echoes.append(Update(str(rank), sent.trainable, weight))
    after = aggregator.spectra(aggregator.aggregate(state, echoes))
    for module, W in before.items():
        np.testing.assert_allclose(after[module].delta().numpy(), W, rtol=0, atol=1e-11)
        assert after[module].tail == 0.0  # nobody brought anything


def test_one_client_loses_no_more_than_the_threshold_allows():
    aggregator = Florist(scaling=SCALING, tau=0.9)
    only = [Update("only", adapter(4, 1), 3.0)]
    state = aggregator.aggregate(aggregator.init(initial()), only)
    for module, spectrum in aggregator.spectra(state).items():
        W = mean_of_products(only, module)
        lost = np.linalg.norm(W - spectrum.delta().numpy())
        assert 0 < lost <= np.sqrt(0.1) * np.linalg.norm(W) and spectrum.tail == pytest.approx(lost)


def test_what_is_sent_is_fresh_factors_and_all_that_was_folded():
    aggregator = Florist(scaling=SCALING, tau=0.5)
    state, kept = aggregator.init(initial()), dict.fromkeys(SHAPES, 0)
    for server_round in range(3):
        sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, 2))
        for module, (out_features, in_features) in SHAPES.items():
            assert sent.trainable[module].rank == 2
            # The paper sends the p directions of one round, and clients remember the rest.
            branch = (sent.frozen or {}).get(module)
            expected = min(kept[module], out_features, in_features)
            found = 0 if branch is None else branch.A.numel() + branch.B.numel()
            assert found == expected * (out_features + in_features)
        updates = cohort(server_round)
        for module in SHAPES:
            kept[module] += thresholded(mean_of_products(updates, module), 0.5)[1]
        state = aggregator.aggregate(state, updates)
