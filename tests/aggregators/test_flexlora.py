"""Expected values come from numpy (dense float64 sums, numpy.linalg.svd), from PEFT, or from the coverage law."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flexlora.aggregators.base import AggregationError
from flexlora.aggregators.flexlora import FlexLora, FlexLoraState
from flexlora.federation.messages import Change, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.q_proj": (24, 24), "mlp.down_proj": (20, 33), "mlp.up_proj": (33, 20)}
SCALING = Scaling("constant_alpha", 16.0)
SERVER_RANK = 8


def random_adapter(ranks: dict[str, int], seed: int, scaling: Scaling = SCALING) -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, SHAPES[module][1], generator=rng),
            torch.randn(SHAPES[module][0], rank, generator=rng),
            scaling(rank),
        )
        for module, rank in sorted(ranks.items())
    }


def uniform(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def initial_adapter() -> AdapterState:
    adapter = random_adapter(uniform(SERVER_RANK), seed=123)
    return {module: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for module, f in adapter.items()}


def learned(aggregator: FlexLora, seed: int = 0) -> FlexLoraState:
    """Return the state after one client of full rank has brought a random change."""
    state = aggregator.init(initial_adapter())
    return aggregator.aggregate(state, [Update("first", random_adapter(uniform(SERVER_RANK), seed), 1.0)])


def echo_round(aggregator: FlexLora, state: FlexLoraState, cohort: list[tuple[dict[str, int], float]]):
    updates = [Update(None, aggregator.broadcast(state, ranks).trainable, weight) for ranks, weight in cohort]
    return aggregator.aggregate(state, updates)


def numpy_mean_of_products(updates: list[Update], module: str) -> np.ndarray:
    total = np.zeros(SHAPES[module])
    for update in updates:
        if module in update.payload:
            f = update.payload[module]
            total += update.weight * f.scaling * (f.B.double().numpy() @ f.A.double().numpy())
    return total / sum(update.weight for update in updates)


def numpy_truncation(W: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(W)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("policy", ["constant_alpha", "constant_ratio", "rslora"])
@pytest.mark.parametrize("split", ["b", "balanced"])
@pytest.mark.parametrize("num_clients", [2, 25])
def test_every_client_receives_the_eckart_young_truncation_of_the_mean_of_products(num_clients, split, policy):
    scaling = Scaling(policy, 6.0)
    aggregator = FlexLora(scaling=scaling, split=split)
    plans = [
        {"attn.q_proj": 1 + i % 8, "mlp.down_proj": 1 + i % 3, **({"mlp.up_proj": 5} if i % 2 else {})}
        for i in range(num_clients)
    ]
    updates = [Update(str(i), random_adapter(plan, i, scaling), 3.0 + i) for i, plan in enumerate(plans)]
    state = aggregator.aggregate(aggregator.init(initial_adapter()), updates)
    for module in SHAPES:
        W = numpy_mean_of_products(updates, module)
        S = np.linalg.svd(W, compute_uv=False)
        for rank in range(1, SERVER_RANK + 1):
            factors = aggregator.broadcast(state, {module: rank}).trainable[module]
            found = factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()
            assert np.linalg.norm(found - numpy_truncation(W, rank)) < 1e-6 * np.linalg.norm(W)
            assert np.linalg.norm(W - found) == pytest.approx(np.linalg.norm(S[rank:]), abs=1e-6 * S[0])


def test_the_aggregate_does_not_depend_on_the_gauge_of_the_payloads():
    aggregator = FlexLora(scaling=SCALING)
    rng = np.random.default_rng(0)
    updates = [Update(str(i), random_adapter(uniform(2 + i), i), 1.0 + i) for i in range(3)]

    def turned(factors: LoraFactors) -> LoraFactors:
        M = torch.tensor(rng.standard_normal((factors.rank, factors.rank)) + 3 * np.eye(factors.rank))
        return LoraFactors(torch.linalg.solve(M, factors.A.double()), factors.B.double() @ M, factors.scaling)

    other = [Update(u.client_id, {m: turned(f) for m, f in u.payload.items()}, u.weight) for u in updates]
    state = aggregator.init(initial_adapter())
    first, second = aggregator.aggregate(state, updates), aggregator.aggregate(state, other)
    for module in SHAPES:
        W = first.spectra[module].delta()
        assert (second.spectra[module].delta() - W).norm() < 1e-11 * W.norm()


COHORT = [(uniform(1), 40.0), (uniform(2), 30.0), ({**uniform(4), "mlp.up_proj": 6}, 20.0), (uniform(8), 10.0)]
COVERAGE = {
    "attn.q_proj": [1, 0.6, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1],
    "mlp.down_proj": [1, 0.6, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1],
    "mlp.up_proj": [1, 0.6, 0.3, 0.3, 0.3, 0.3, 0.1, 0.1],
}


@pytest.mark.parametrize("options", [{}, {"split": "balanced"}, {"fold_tail": True}], ids=str)
def test_echoing_clients_decay_each_direction_by_its_coverage(options):
    aggregator = FlexLora(scaling=SCALING, **options)
    start = state = learned(aggregator)
    for server_round in range(1, 6):
        state = echo_round(aggregator, state, COHORT)
        for module, coverage in COVERAGE.items():
            expected = start.spectra[module].S.numpy() * np.array(coverage) ** server_round
            np.testing.assert_allclose(state.spectra[module].S.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("fold_tail", [False, True])
def test_error_compensation_keeps_everything_whoever_echoes(fold_tail):
    aggregator = FlexLora(scaling=SCALING, error_compensation=True, fold_tail=fold_tail)
    start = state = learned(aggregator)
    cohorts = [COHORT, COHORT[:1], [({"mlp.up_proj": 3}, 1.0)], COHORT[1:3], COHORT[:2]]
    for cohort in cohorts:
        state = echo_round(aggregator, state, cohort)
    for module in SHAPES:
        W = start.spectra[module].delta()
        assert (state.spectra[module].delta() - W).norm() < 1e-6 * W.norm()


def test_error_compensation_adds_each_change_against_what_was_sent():
    aggregator = FlexLora(scaling=SCALING, error_compensation=True, server_rank=33)
    state = learned(aggregator)
    cohort = [({"attn.q_proj": 3, "mlp.down_proj": 2}, 2.0), (uniform(6), 6.0)]
    updates = [Update(str(i), random_adapter(ranks, i), weight) for i, (ranks, weight) in enumerate(cohort)]
    after = aggregator.aggregate(state, updates)
    for module in SHAPES:
        G = state.spectra[module].delta().numpy()
        sent = sum(weight / 8 * numpy_truncation(G, ranks.get(module, 0)) for ranks, weight in cohort)
        expected = G + numpy_mean_of_products(updates, module) - sent
        assert np.linalg.norm(after.spectra[module].delta().numpy() - expected) < 1e-12 * np.linalg.norm(expected)


def test_with_both_switches_the_aggregate_is_the_mean_of_the_models_clients_ran():
    aggregator = FlexLora(scaling=SCALING, error_compensation=True, fold_tail=True, server_rank=33)
    state = learned(aggregator)
    ranks_of = [{"attn.q_proj": 3, "mlp.down_proj": 2}, uniform(6), uniform(8)]
    updates = [Update(str(i), random_adapter(ranks, i), 1.0 + i) for i, ranks in enumerate(ranks_of)]
    after = aggregator.aggregate(state, updates)
    for module in SHAPES:
        ran = np.zeros(SHAPES[module])
        for update, ranks in zip(updates, ranks_of, strict=True):
            for branch in (update.payload, aggregator.broadcast(state, ranks).frozen or {}):
                ran += update.weight / 6 * (branch[module].delta().numpy() if module in branch else 0)
        assert np.linalg.norm(after.spectra[module].delta().numpy() - ran) < 1e-6 * np.linalg.norm(ran)


@pytest.mark.parametrize("split", ["b", "balanced"])
def test_the_trainable_and_the_frozen_branch_add_up_to_the_aggregate(split):
    aggregator = FlexLora(scaling=SCALING, fold_tail=True, split=split)
    state = learned(aggregator)
    broadcast = aggregator.broadcast(state, {"attn.q_proj": 3, "mlp.down_proj": 8})
    assert broadcast.frozen is not None
    assert {module: factors.rank for module, factors in broadcast.frozen.items()} == {
        "attn.q_proj": 5,
        "mlp.up_proj": 8,
    }
    for module in SHAPES:
        branches = [branch[module].delta() for branch in (broadcast.trainable, broadcast.frozen) if module in branch]
        W = state.spectra[module].delta()
        assert (torch.stack(branches).sum(0) - W).norm() < 1e-6 * W.norm()


def test_nothing_is_frozen_when_nothing_is_left_over():
    folding, plain = FlexLora(scaling=SCALING, fold_tail=True), FlexLora(scaling=SCALING)
    assert folding.broadcast(folding.init(initial_adapter()), uniform(2)).frozen is None
    assert folding.broadcast(learned(folding), uniform(SERVER_RANK)).frozen is None
    assert plain.broadcast(learned(plain), uniform(1)).frozen is None


def test_a_module_nobody_brought_goes_to_zero_or_stays_under_error_compensation():
    cohort = [({"attn.q_proj": 4}, 1.0)]
    plain, compensated = FlexLora(scaling=SCALING), FlexLora(scaling=SCALING, error_compensation=True)
    assert echo_round(plain, learned(plain), cohort).spectra["mlp.up_proj"].S.shape == (0,)
    start = learned(compensated).spectra["mlp.up_proj"]
    found = echo_round(compensated, learned(compensated), cohort).spectra["mlp.up_proj"]
    np.testing.assert_allclose(found.S.numpy(), start.S.numpy(), rtol=1e-12)


def test_a_rank_above_the_aggregates_is_filled_with_rows_that_can_learn():
    aggregator = FlexLora(scaling=SCALING)
    state = aggregator.init(initial_adapter())
    state = aggregator.aggregate(state, [Update("small", random_adapter(uniform(2), 0), 1.0)])
    for module, factors in aggregator.broadcast(state, uniform(40)).trainable.items():
        out_features, in_features = SHAPES[module]
        assert (factors.A.shape, factors.B.shape) == ((40, in_features), (out_features, 40))
        assert not factors.B[:, 2:].any()
        assert factors.A.norm(dim=1).allclose(torch.ones(40))
        rows = factors.A[:in_features]
        assert torch.allclose(rows @ rows.T, torch.eye(in_features), atol=1e-6)


def test_the_server_keeps_the_largest_rank_it_has_met_unless_told_otherwise():
    updates = [Update(str(i), random_adapter(uniform(12), i), 1.0) for i in range(4)]
    grown, capped = FlexLora(scaling=SCALING), FlexLora(scaling=SCALING, server_rank=3)
    state = grown.aggregate(grown.init(initial_adapter()), updates)
    assert {len(spectrum.S) for spectrum in state.spectra.values()} == {12}
    assert {len(s.S) for s in grown.aggregate(state, updates[:1]).spectra.values()} == {12}
    kept = capped.aggregate(capped.init(initial_adapter()), updates).spectra["mlp.up_proj"]
    S = np.linalg.svd(numpy_mean_of_products(updates, "mlp.up_proj"), compute_uv=False)
    assert len(kept.S) == 3
    assert kept.tail == pytest.approx(np.linalg.norm(S[3:]))


def test_spectra_carry_what_the_server_rank_cut_off():
    updates = [Update(str(i), random_adapter(uniform(4), i), 1.0 + i) for i in range(3)]
    aggregator = FlexLora(scaling=SCALING, server_rank=3)
    spectra = aggregator.spectra(aggregator.aggregate(aggregator.init(initial_adapter()), updates))
    assert list(spectra) == sorted(SHAPES)
    for module, spectrum in spectra.items():
        S = np.linalg.svd(numpy_mean_of_products(updates, module), compute_uv=False)
        np.testing.assert_allclose(spectrum.S.numpy(), S[:3], rtol=1e-10)
        assert spectrum.tail == pytest.approx(np.linalg.norm(S[3:]))
        assert spectrum.tail > 0


def test_an_adapter_that_has_already_learned_is_kept_by_init():
    adapter = random_adapter(uniform(4), 5)
    aggregator = FlexLora(scaling=SCALING)
    found = aggregator.broadcast(aggregator.init(adapter), uniform(4)).trainable
    for module, factors in adapter.items():
        assert (found[module].delta() - factors.delta()).norm() < 1e-6 * factors.norm()


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 19, bias=False)
        self.down = nn.Linear(19, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def test_the_aggregate_equals_the_concatenation_that_peft_makes_of_several_adapters():
    ranks, alphas, weights = [2, 3, 5], [8.0, 3.0, 16.0], [0.5, 0.2, 0.3]
    torch.manual_seed(0)  # PEFT initialises from the global stream
    names = [f"client{i}" for i in range(3)]
    for i, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["up", "down"], init_lora_weights=False)
        if i == 0:
            model = get_peft_model(TwoLayers(), config, adapter_name=names[0])
        else:
            model.add_adapter(names[i], config)
    model.add_weighted_adapter(names, weights, "merged", combination_type="cat")
    layers = {module: getattr(model.base_model.model, module) for module in ("up", "down")}
    updates = [
        Update(
            name,
            {m: LoraFactors(x.lora_A[name].weight, x.lora_B[name].weight, x.scaling[name]) for m, x in layers.items()},
            weight,
        )
        for name, weight in zip(names, weights, strict=True)
    ]
    aggregator = FlexLora(scaling=Scaling("rslora", 16.0), server_rank=10)
    state = aggregator.init({m: LoraFactors(f.A, 0 * f.B, f.scaling) for m, f in updates[2].payload.items()})
    found = aggregator.broadcast(aggregator.aggregate(state, updates), {"up": 10, "down": 10}).trainable
    for module, layer in layers.items():
        expected = layer.get_delta_weight("merged").detach().double()
        assert (found[module].delta() - expected).norm() < 1e-6 * expected.norm()


def numpy_delta(adapter: AdapterState, module: str) -> np.ndarray:
    factors = adapter[module]
    return factors.scaling * factors.B.double().numpy() @ factors.A.double().numpy()


def test_late_changes_are_added_against_what_each_client_was_sent_and_discounted():
    aggregator = FlexLora(scaling=SCALING, server_rank=20)
    old = learned(aggregator)
    now = aggregator.aggregate(old, [Update("second", random_adapter(uniform(5), 9), 1.0)])
    sent = [aggregator.broadcast(old, uniform(2)).trainable, aggregator.broadcast(now, uniform(3)).trainable]
    changes = [
        Change(Update("a", random_adapter(uniform(2), 1), 10.0), sent[0], 0.5),
        Change(Update("b", random_adapter(uniform(2), 2), 30.0), sent[0], 0.5),
        Change(Update("c", random_adapter(uniform(3), 3), 60.0), sent[1], 1.0),
    ]
    found = aggregator.add_changes(now, iter(changes))
    for module, spectrum in found.spectra.items():
        expected = now.spectra[module].delta().numpy()
        for change, share in zip(changes, (0.05, 0.15, 0.6), strict=True):
            expected = expected + share * (
                numpy_delta(change.update.payload, module) - numpy_delta(change.start, module)
            )
        np.testing.assert_allclose(spectrum.delta().numpy(), expected, atol=1e-9 * np.linalg.norm(expected))


def test_changes_that_are_not_late_are_error_compensation():
    compensated = FlexLora(scaling=SCALING, server_rank=20, error_compensation=True)
    state = learned(compensated)
    cohort = [(uniform(2), 10.0), (uniform(3), 30.0), ({"attn.q_proj": 4}, 5.0)]
    updates = [
        Update(f"client{number}", random_adapter(ranks, number), weight)
        for number, (ranks, weight) in enumerate(cohort)
    ]
    changes = [
        Change(update, compensated.broadcast(state, ranks).trainable)
        for update, (ranks, _) in zip(updates, cohort, strict=True)
    ]
    whole = compensated.aggregate(state, updates)
    for method in (compensated, FlexLora(scaling=SCALING, server_rank=20)):
        added = method.add_changes(state, changes)
        for module, spectrum in whole.spectra.items():
            # Broadcasts are float32.
            assert (added.spectra[module].delta() - spectrum.delta()).norm() < 1e-6 * spectrum.delta().norm()


def test_a_change_at_other_ranks_than_were_sent_is_refused():
    aggregator = FlexLora(scaling=SCALING)
    state = learned(aggregator)
    change = Change(Update("a", random_adapter(uniform(2), 1), 1.0), aggregator.broadcast(state, uniform(3)).trainable)
    with pytest.raises(AggregationError, match=r"ranks that its client was sent, .* from 'a'"):
        aggregator.add_changes(state, [change])


MIXED = [({"attn.q_proj": 3, "mlp.down_proj": 2}, 2.0), (uniform(6), 6.0)]


def mixed_updates(seed: int) -> list[Update]:
    return [Update(str(i), random_adapter(ranks, seed + i), weight) for i, (ranks, weight) in enumerate(MIXED)]


@pytest.mark.parametrize("eta", [0.4, 1.3])
def test_a_server_learning_rate_shortens_or_stretches_the_way_to_the_mean_of_products(eta):
    aggregator = FlexLora(scaling=SCALING, server_rank=33, server_learning_rate=eta)
    state = learned(aggregator)
    after = aggregator.aggregate(state, mixed_updates(3))
    for module in SHAPES:
        G, P = state.spectra[module].delta().numpy(), numpy_mean_of_products(mixed_updates(3), module)
        expected = (1 - eta) * G + eta * P
        assert np.linalg.norm(after.spectra[module].delta().numpy() - expected) < 1e-12 * np.linalg.norm(expected)


def test_a_server_learning_rate_with_error_compensation_weakens_each_direction_by_its_coverage():
    eta = 0.4
    aggregator = FlexLora(scaling=SCALING, server_rank=33, error_compensation=True, server_learning_rate=eta)
    state = learned(aggregator)
    after = aggregator.aggregate(state, mixed_updates(3))
    for module in SHAPES:
        U, S, Vh = np.linalg.svd(state.spectra[module].delta().numpy(), full_matrices=False)
        directions = np.arange(len(S))
        covered = sum(weight / 8 * (directions < ranks.get(module, 0)) for ranks, weight in MIXED)
        expected = (U * (1 - eta * covered) * S) @ Vh + eta * numpy_mean_of_products(mixed_updates(3), module)
        assert np.linalg.norm(after.spectra[module].delta().numpy() - expected) < 1e-12 * np.linalg.norm(expected)


@pytest.mark.parametrize("compensated", [False, True])
def test_server_momentum_adds_a_share_of_the_last_step(compensated):
    eta, beta = 0.7, 0.6
    options = {"server_learning_rate": eta, "server_momentum": beta, "error_compensation": compensated}
    aggregator = FlexLora(scaling=SCALING, server_rank=33, **options)
    state = aggregator.init(initial_adapter())
    G = M = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for server_round in range(3):
        updates = mixed_updates(10 * server_round)
        state = aggregator.aggregate(state, updates)
        for module in SHAPES:
            goal = numpy_mean_of_products(updates, module)
            if compensated:
                held = [weight / 8 * numpy_truncation(G[module], ranks.get(module, 0)) for ranks, weight in MIXED]
                goal = goal + G[module] - sum(held)
            M = {**M, module: beta * M[module] + goal - G[module]}
            G = {**G, module: G[module] + eta * M[module]}
            error = np.linalg.norm(state.spectra[module].delta().numpy() - G[module])
            assert error < 1e-10 * np.linalg.norm(G[module])


def test_late_changes_are_a_step_of_the_server_optimiser_too():
    eta, beta = 0.5, 0.8
    aggregator = FlexLora(scaling=SCALING, server_rank=33, server_learning_rate=eta, server_momentum=beta)
    state = learned(aggregator)
    start = aggregator.broadcast(state, uniform(3)).trainable
    change = Change(Update("a", random_adapter(uniform(3), 4), 10.0), start, 0.25)
    after = aggregator.add_changes(state, [change])
    for module, spectrum in state.spectra.items():
        # The first round's step was the whole of the first client's change.
        first = spectrum.delta().numpy() / eta
        step = 0.25 * (numpy_delta(change.update.payload, module) - numpy_delta(start, module))
        expected = spectrum.delta().numpy() + eta * (beta * first + step)
        np.testing.assert_allclose(after.spectra[module].delta().numpy(), expected, atol=1e-9 * np.linalg.norm(first))


def test_a_server_that_goes_all_the_way_without_momentum_remembers_nothing():
    plain, spelt_out = (
        FlexLora(scaling=SCALING),
        FlexLora(scaling=SCALING, server_learning_rate=1.0, server_momentum=0.0),
    )
    assert not plain.traits.server_optimizer and plain == spelt_out
    assert learned(plain).momentum is None
    for option in ({"server_learning_rate": 0.5}, {"server_momentum": 0.5}):
        assert FlexLora(scaling=SCALING, **option).traits.server_optimizer


ENERGY_S = np.array([8.0, 4.0, 2.0, 1.0, 0.5])  # squares 64 / 16 / 4 / 1 / 0.25 of 85.25; shares .751 .938 .985 .997 1


def with_spectrum(aggregator: FlexLora, values: np.ndarray = ENERGY_S) -> FlexLoraState:
    """Return the state after one client has brought a change with these singular values in every module."""
    rng = np.random.default_rng(5)
    payload: dict[str, LoraFactors] = {}
    for module, (rows, columns) in sorted(SHAPES.items()):
        U, V = (np.linalg.qr(rng.standard_normal((side, len(values))))[0] for side in (rows, columns))
        payload[module] = LoraFactors(torch.tensor(V.T), torch.tensor(U * values / 2.0), 2.0)
    return aggregator.aggregate(aggregator.init(initial_adapter()), [Update("a", payload, 1.0)])


def ranks_sent(aggregator: FlexLora, state: FlexLoraState, ranks: dict[str, int]) -> dict[str, int]:
    return {module: factors.rank for module, factors in aggregator.broadcast(state, ranks).trainable.items()}


@pytest.mark.parametrize(
    ("energy", "spare", "rank", "expected"),
    [(0.75, 0, 8, 1), (0.76, 0, 8, 2), (0.9, 1, 8, 3), (0.9, 1, 2, 2), (0.99, 3, 8, 7), (1.0, 0, 8, 5), (1.0, 1, 4, 4)],
)
def test_a_client_is_sent_the_directions_that_hold_the_energy_and_the_spare_ones(energy, spare, rank, expected):
    aggregator = FlexLora(scaling=SCALING, energy=energy, spare_directions=spare)
    state = with_spectrum(aggregator)
    sent = aggregator.broadcast(state, uniform(rank)).trainable
    assert aggregator.traits.fewer_directions
    for module, factors in sent.items():
        assert (factors.rank, factors.scaling) == (expected, SCALING(expected))
        G = state.spectra[module].delta().numpy()
        np.testing.assert_allclose(numpy_delta(sent, module), numpy_truncation(G, expected), atol=1e-6 * ENERGY_S[0])
        assert (factors.A.any(dim=1) | factors.B.any(dim=0)).all()


def test_before_anything_is_learned_every_rank_is_sent_in_full():
    aggregator = FlexLora(scaling=SCALING, energy=0.5)
    assert ranks_sent(aggregator, aggregator.init(initial_adapter()), uniform(SERVER_RANK)) == uniform(SERVER_RANK)
    # A module of its own: what others have learned says nothing about it.
    state = echo_round(aggregator, with_spectrum(aggregator), [({"attn.q_proj": 4}, 1.0)])
    assert ranks_sent(aggregator, state, uniform(6)) == {"attn.q_proj": 2, "mlp.down_proj": 6, "mlp.up_proj": 6}


@pytest.mark.parametrize(("spare", "expected"), [(0, [1, 1, 1, 1]), (1, [2, 3, 4, 4]), (2, [3, 4, 4, 4])])
def test_spare_directions_let_a_module_grow_that_one_client_keeps_teaching(spare, expected):
    aggregator = FlexLora(scaling=SCALING, energy=1.0, spare_directions=spare)
    state, found = with_spectrum(aggregator, np.array([1.0])), []
    for seed in range(4):
        sent = aggregator.broadcast(state, {"attn.q_proj": 4}).trainable
        found.append(sent["attn.q_proj"].rank)
        rng = torch.Generator().manual_seed(seed)
        payload = {m: LoraFactors(f.A, f.B + torch.randn(f.B.shape, generator=rng), f.scaling) for m, f in sent.items()}
        state = aggregator.aggregate(state, [Update("a", payload, 1.0)])
    assert found == expected


def test_with_the_tail_folded_what_was_not_sent_to_train_is_sent_frozen():
    aggregator = FlexLora(scaling=SCALING, energy=0.9, fold_tail=True, error_compensation=True)
    state = with_spectrum(aggregator)
    broadcast = aggregator.broadcast(state, {"attn.q_proj": 4, "mlp.down_proj": 1})
    assert broadcast.frozen is not None
    assert {module: factors.rank for module, factors in broadcast.trainable.items()} == {
        "attn.q_proj": 3,
        "mlp.down_proj": 1,
    }
    for module in SHAPES:
        branches = [branch[module].delta() for branch in (broadcast.trainable, broadcast.frozen) if module in branch]
        W = state.spectra[module].delta()
        assert (torch.stack(branches).sum(0) - W).norm() < 1e-6 * W.norm()


def test_error_compensation_keeps_what_the_energy_left_out_and_the_papers_rule_does_not():
    for compensated, expected in ((True, ENERGY_S), (False, ENERGY_S[:3])):
        aggregator = FlexLora(scaling=SCALING, energy=0.9, error_compensation=compensated)
        after = echo_round(aggregator, with_spectrum(aggregator), [(uniform(8), 2.0), (uniform(4), 1.0)])
        for spectrum in after.spectra.values():
            np.testing.assert_allclose(spectrum.S.numpy(), expected, rtol=1e-5)


def test_spare_directions_without_an_energy_are_refused():
    with pytest.raises(ValueError, match=r"spare_directions=3 is ignored without method\.energy"):
        FlexLora(scaling=SCALING, spare_directions=3)
