"""Expected values come from numpy (the paper's sum over parts, numpy.linalg.svd), or from FlexLoRA at one rank."""

import numpy as np
import pytest
import torch

from flexlora.aggregators.flexlora import FlexLora
from flexlora.aggregators.ra_flora import RaFlora
from flexlora.federation.messages import Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.q_proj": (12, 12), "mlp.down_proj": (10, 17), "mlp.up_proj": (17, 10)}
SCALING = Scaling("constant_alpha", 16.0)
SERVER_RANK = 6
COHORT = [(2, 1.0), (4, 3.0), (6, 4.0), (2, 2.0)]


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


def cohort(seed: int = 0, pairs: list[tuple[int, float]] = COHORT) -> list[Update]:
    return [Update(str(i), adapter(rank, 10 * seed + i), weight) for i, (rank, weight) in enumerate(pairs)]


def by_parts(updates: list[Update], module: str, levels: list[int]) -> np.ndarray:
    """Return the paper's sum over the parts between these rank levels."""
    total = np.zeros(SHAPES[module])
    for low, high in zip([0, *levels], levels, strict=False):
        holders = [u for u in updates if module in u.payload and u.payload[module].rank >= high]
        examples = sum(u.weight for u in holders)
        for update in holders:
            f = update.payload[module]
            B, A = f.B.double().numpy()[:, low:high], f.A.double().numpy()[low:high]
            total += update.weight / examples * f.scaling * B @ A
    return total


def truncation(W: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(W)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def dense(factors: LoraFactors) -> np.ndarray:
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


@pytest.mark.parametrize("levels", [[2, 4, 6], [1, 2, 3, 4, 5, 6], [2, 3, 4, 6]], ids=str)
def test_any_parts_as_fine_as_the_clients_ranks_give_the_weights_of_the_directions(levels: list[int]):
    aggregator, updates = RaFlora(scaling=SCALING), cohort()
    state = aggregator.aggregate(aggregator.init(initial()), updates)
    for module in SHAPES:
        W = by_parts(updates, module, levels)
        for rank in (1, 2, 5, SERVER_RANK):
            found = dense(aggregator.broadcast(state, {module: rank}).trainable[module])
            assert np.linalg.norm(found - truncation(W, rank)) < 1e-6 * np.linalg.norm(W)
        S = np.linalg.svd(W, compute_uv=False)
        spectrum = aggregator.spectra(state)[module]
        np.testing.assert_allclose(spectrum.S.numpy(), S[:SERVER_RANK], rtol=1e-10)
        assert spectrum.tail == pytest.approx(np.linalg.norm(S[SERVER_RANK:]), abs=1e-10 * S[0])


def test_both_factors_carry_the_roots_of_the_singular_values():
    aggregator = RaFlora(scaling=SCALING)
    state = aggregator.aggregate(aggregator.init(initial()), cohort())
    for module in SHAPES:
        S = np.linalg.svd(by_parts(cohort(), module, [2, 4, 6]), compute_uv=False)
        factors = aggregator.broadcast(state, {module: 3}).trainable[module]
        np.testing.assert_allclose(factors.A.double().norm(dim=1).numpy(), np.sqrt(S[:3] / SCALING(3)), rtol=1e-5)
        np.testing.assert_allclose(factors.B.double().norm(dim=0).numpy(), np.sqrt(S[:3] / SCALING(3)), rtol=1e-5)


def test_at_one_rank_it_is_flexlora():
    updates = cohort(pairs=[(SERVER_RANK, 1.0), (SERVER_RANK, 3.0), (SERVER_RANK, 4.0)])
    ours, theirs = RaFlora(scaling=SCALING), FlexLora(scaling=SCALING, split="balanced")
    first = ours.broadcast(ours.aggregate(ours.init(initial()), updates), dict.fromkeys(SHAPES, SERVER_RANK))
    second = theirs.broadcast(theirs.aggregate(theirs.init(initial()), updates), dict.fromkeys(SHAPES, SERVER_RANK))
    for module in SHAPES:
        torch.testing.assert_close(first.trainable[module].A, second.trainable[module].A)
        torch.testing.assert_close(first.trainable[module].B, second.trainable[module].B)


def test_at_mixed_ranks_it_is_not_the_mean_of_products():
    updates = cohort()
    aggregator = RaFlora(scaling=SCALING)
    state = aggregator.aggregate(aggregator.init(initial()), updates)
    total = sum(update.weight for update in updates)
    for module in SHAPES:
        P = sum(update.weight / total * dense(update.payload[module]) for update in updates)
        W = aggregator.spectra(state)[module].delta().numpy()
        assert np.linalg.norm(W - truncation(np.asarray(P), SERVER_RANK)) > 0.1 * np.linalg.norm(P)


def test_echoing_clients_change_nothing_at_mixed_ranks():
    aggregator = RaFlora(scaling=SCALING)
    start = state = aggregator.aggregate(aggregator.init(initial()), cohort())
    for _ in range(3):
        echoes = [
            Update(str(i), aggregator.broadcast(state, dict.fromkeys(SHAPES, rank)).trainable, weight)
            for i, (rank, weight) in enumerate(COHORT)
        ]
        state = aggregator.aggregate(state, echoes)
    for module in SHAPES:
        W = start.change.spectra[module].delta()
        assert (state.change.spectra[module].delta() - W).norm() < 1e-6 * W.norm()


def test_directions_and_modules_that_nobody_has_stay_as_they_were():
    aggregator = RaFlora(scaling=SCALING)
    before = aggregator.aggregate(aggregator.init(initial()), cohort())
    small = [Update("a", {"attn.q_proj": adapter(2, 7)["attn.q_proj"]}, 1.0)]
    # A client without examples holds nothing, whatever its rank.
    ghost = Update("ghost", adapter(SERVER_RANK, 8), 0.0)
    for updates in (small, [*small, ghost]):
        after = aggregator.aggregate(before, updates).change.spectra
        old = before.change.spectra["attn.q_proj"]
        W = dense(small[0].payload["attn.q_proj"]) + ((old.U * old.S)[:, 2:] @ old.Vh[2:]).numpy()
        np.testing.assert_allclose(after["attn.q_proj"].delta().numpy(), W, rtol=0, atol=1e-10)
        for module in ("mlp.down_proj", "mlp.up_proj"):
            W = before.change.spectra[module].delta().numpy()
            np.testing.assert_allclose(after[module].delta().numpy(), W, rtol=0, atol=1e-10)


def test_clients_that_lack_a_module_do_not_thin_it_out():
    aggregator, updates = RaFlora(scaling=SCALING), cohort()
    partial = Update("partial", {"attn.q_proj": adapter(3, 9)["attn.q_proj"]}, 100.0)
    after = aggregator.aggregate(aggregator.init(initial()), [*updates, partial]).change.spectra
    W = truncation(by_parts(updates, "mlp.down_proj", [2, 4, 6]), SERVER_RANK)
    np.testing.assert_allclose(after["mlp.down_proj"].delta().numpy(), W, rtol=0, atol=1e-10)
    W = truncation(by_parts([*updates, partial], "attn.q_proj", [2, 3, 4, 6]), SERVER_RANK)
    np.testing.assert_allclose(after["attn.q_proj"].delta().numpy(), W, rtol=0, atol=1e-10)


def test_ranks_above_the_aggregates_get_rows_that_can_learn():
    aggregator = RaFlora(scaling=SCALING)
    state = aggregator.aggregate(aggregator.init(initial()), cohort(pairs=[(2, 1.0)]))
    for rank in (4, SERVER_RANK, SERVER_RANK + 2):
        factors = aggregator.broadcast(state, {"mlp.down_proj": rank}).trainable["mlp.down_proj"]
        assert factors.rank == rank and factors.A.any(dim=1).all() and not factors.B[:, 2:].any()


def test_factors_alone_travel_in_both_directions():
    aggregator = RaFlora(scaling=SCALING)
    state = aggregator.aggregate(aggregator.init(initial()), cohort())
    sent = aggregator.broadcast(state, dict.fromkeys(SHAPES, 4))
    assert (sent.frozen, sent.train_factors) == (None, "both")
    assert [f.A.numel() + f.B.numel() for f in sent.trainable.values()] == [4 * sum(s) for s in SHAPES.values()]
