"""What every aggregation method must do, tried on each method of the registry and on each switch of flexlora."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from flexlora import FlexLoraError
from flexlora.aggregators.base import AggregationError, Aggregator
from flexlora.aggregators.registry import AGGREGATORS, STATE_TYPES
from flexlora.federation.messages import Broadcast, Update
from flexlora.lora.factors import AdapterState, LoraFactors, Scaling

SHAPES = {"attn.k_proj": (6, 20), "attn.q_proj": (20, 20), "mlp.down_proj": (20, 31)}
SERVER_RANK = 5
ONE_RANK = {"fedit"}  # methods whose clients must all have the server's rank

METHODS = [(name, {}) for name in AGGREGATORS] + [
    ("flexlora", {"error_compensation": True}),
    ("flexlora", {"fold_tail": True}),
    ("flexlora", {"error_compensation": True, "fold_tail": True}),
    ("flexlora", {"split": "balanced"}),
    ("flexlora", {"server_rank": 7}),
    ("flexlora", {"server_rank": 5}),
]
POLICIES = [Scaling("constant_alpha", 16.0), Scaling("constant_ratio", 2.0), Scaling("rslora", 4.0)]

every_method = pytest.mark.parametrize(
    ("name", "options"), METHODS, ids=[name + "".join(f"-{o}" for o in options) for name, options in METHODS]
)
every_policy = pytest.mark.parametrize("scaling", POLICIES, ids=lambda scaling: scaling.policy)


def build(name: str, options: Mapping[str, object], scaling: Scaling = POLICIES[0]) -> Aggregator:
    return AGGREGATORS[name](scaling=scaling, **options)


def initial_adapter(scaling: Scaling = POLICIES[0], rank: int = SERVER_RANK) -> AdapterState:
    rng = torch.Generator().manual_seed(0)
    return {
        module: LoraFactors(torch.rand(rank, shape[1], generator=rng) - 0.5, torch.zeros(shape[0], rank), scaling(rank))
        for module, shape in SHAPES.items()
    }


def all_modules(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def plans(name: str) -> list[dict[str, int]]:
    """Return the ranks of four clients: mixed, and not the same in every module, where the method can do that."""
    if name in ONE_RANK:
        return [all_modules(SERVER_RANK)] * 4
    mixed = {"attn.k_proj": 1, "attn.q_proj": 2, "mlp.down_proj": 4}
    return [all_modules(2), mixed, all_modules(SERVER_RANK), all_modules(1)]


def trained(broadcast: Broadcast, seed: int) -> AdapterState:
    rng = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            factors.A + 0.3 * torch.randn(factors.A.shape, generator=rng),
            factors.B + 0.3 * torch.randn(factors.B.shape, generator=rng),
            factors.scaling,
        )
        for module, factors in broadcast.trainable.items()
    }


def one_round(aggregator: Aggregator, state, name: str, seed: int = 0) -> list[Update]:
    return [
        Update(f"client-{i}", trained(aggregator.broadcast(state, plan), 10 * seed + i), weight=10.0 * (i + 1))
        for i, plan in enumerate(plans(name))
    ]


def after_a_round(aggregator: Aggregator, name: str, seed: int = 0):
    state = aggregator.init(initial_adapter(aggregator.scaling))
    return aggregator.aggregate(state, one_round(aggregator, state, name, seed))


def deltas(aggregator: Aggregator, state, ranks: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    broadcast = aggregator.broadcast(state, ranks or all_modules(SERVER_RANK))
    return {module: factors.delta().numpy() for module, factors in broadcast.trainable.items()}


def assert_equal_deltas(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], rtol: float = 1e-5):
    assert list(found) == list(expected)
    for module, delta in expected.items():
        assert np.linalg.norm(found[module] - delta) <= rtol * np.linalg.norm(delta), module


@every_method
@every_policy
def test_round_one_starts_from_the_initial_rows_and_a_zero_b_at_every_rank(name, options, scaling):
    aggregator = build(name, options, scaling)
    adapter = initial_adapter(scaling)
    state = aggregator.init(adapter)
    for plan in plans(name):
        for module, factors in aggregator.broadcast(state, plan).trainable.items():
            assert torch.equal(factors.A, adapter[module].A[: plan[module]])
            assert not factors.B.any()


@every_method
@every_policy
def test_one_client_is_a_fixed_point(name, options, scaling):
    aggregator = build(name, options, scaling)
    for plan in plans(name):
        state = aggregator.init(initial_adapter(scaling))
        payload = trained(aggregator.broadcast(state, plan), seed=1)
        state = aggregator.aggregate(state, [Update("only", payload, weight=3.0)])
        expected = {module: factors.delta().numpy() for module, factors in payload.items()}
        assert_equal_deltas(deltas(aggregator, state, plan), expected)
        echo = aggregator.broadcast(state, plan).trainable
        state = aggregator.aggregate(state, [Update("only", echo, weight=3.0)])
        assert_equal_deltas(deltas(aggregator, state, plan), expected)


@every_method
def test_the_order_of_clients_does_not_matter(name, options):
    aggregator = build(name, options)
    state = after_a_round(aggregator, name)
    updates = one_round(aggregator, state, name, seed=1)
    first = deltas(aggregator, aggregator.aggregate(state, updates))
    assert_equal_deltas(deltas(aggregator, aggregator.aggregate(state, updates[::-1])), first)


@every_method
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_only_the_ratios_of_weights_matter(name, options, factor):
    aggregator = build(name, options)
    state = after_a_round(aggregator, name)
    updates = one_round(aggregator, state, name, seed=1)
    scaled = [Update(update.client_id, update.payload, factor * update.weight) for update in updates]
    first = deltas(aggregator, aggregator.aggregate(state, updates))
    assert_equal_deltas(deltas(aggregator, aggregator.aggregate(state, scaled)), first)


@every_method
def test_a_client_of_weight_zero_changes_nothing_in_what_others_hold(name, options):
    aggregator = build(name, options)
    state = after_a_round(aggregator, name)
    updates = one_round(aggregator, state, name, seed=1)
    ghost = Update("ghost", trained(aggregator.broadcast(state, plans(name)[0]), seed=99), weight=0.0)
    first = deltas(aggregator, aggregator.aggregate(state, updates))
    assert_equal_deltas(deltas(aggregator, aggregator.aggregate(state, [*updates, ghost])), first)


@every_method
@every_policy
def test_a_broadcast_has_exactly_the_ranks_scalings_and_shapes_asked_for(name, options, scaling):
    aggregator = build(name, options, scaling)
    state = after_a_round(aggregator, name)
    for rank in [SERVER_RANK] if name in ONE_RANK else range(1, SERVER_RANK + 1):
        trainable = aggregator.broadcast(state, all_modules(rank)).trainable
        assert list(trainable) == sorted(SHAPES)
        for module, factors in trainable.items():
            assert (factors.A.shape, factors.B.shape) == ((rank, SHAPES[module][1]), (SHAPES[module][0], rank))
            assert factors.scaling == scaling(rank)
            assert (factors.A.dtype, factors.B.dtype) == (torch.float32, torch.float32)
            assert factors.A.any(dim=1).all()


@every_method
def test_a_client_that_lacks_modules_is_served_or_refused_by_name(name, options):
    aggregator = build(name, options)
    state = after_a_round(aggregator, name)
    full = one_round(aggregator, state, name, seed=1)
    partial = Update("partial", {"mlp.down_proj": full[1].payload["mlp.down_proj"]}, weight=100.0)
    if name in ONE_RANK:
        with pytest.raises(AggregationError, match=r"'attn\.k_proj'.*'partial' has 0"):
            aggregator.aggregate(state, [*full, partial])
        with pytest.raises(AggregationError, match="has 0"):
            aggregator.broadcast(state, {"mlp.down_proj": SERVER_RANK})
        return
    with_partial = aggregator.aggregate(state, [*full, partial])
    assert list(aggregator.broadcast(with_partial, {"mlp.down_proj": 2}).trainable) == ["mlp.down_proj"]
    # Its weight of one half counts in the modules it lacks: what only others brought shrinks.
    if not options.get("error_compensation"):
        module = "attn.q_proj"
        without = deltas(aggregator, aggregator.aggregate(state, full))[module]
        assert np.linalg.norm(deltas(aggregator, with_partial)[module]) < 0.6 * np.linalg.norm(without)


@pytest.mark.parametrize(("name", "options"), [method for method in METHODS if method[0] not in ONE_RANK])
def test_a_module_in_no_update_still_yields_factors_that_can_learn(name, options):
    aggregator = build(name, options)
    state = after_a_round(aggregator, name)
    updates = [
        Update(update.client_id, {"mlp.down_proj": update.payload["mlp.down_proj"]}, update.weight)
        for update in one_round(aggregator, state, name, seed=1)
    ]
    factors = aggregator.broadcast(aggregator.aggregate(state, updates), all_modules(3)).trainable["attn.q_proj"]
    assert factors.rank == 3
    assert factors.A.any(dim=1).all()


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_payloads_of_any_precision_are_averaged_without_further_loss(name, options, dtype):
    aggregator = build(name, options)
    state = after_a_round(aggregator, name)
    updates = one_round(aggregator, state, name, seed=1)
    low = [
        Update(u.client_id, {module: factors.to(dtype) for module, factors in u.payload.items()}, u.weight)
        for u in updates
    ]
    same = [
        Update(u.client_id, {module: factors.to(torch.float64) for module, factors in u.payload.items()}, u.weight)
        for u in low
    ]
    found, expected = aggregator.aggregate(state, low), aggregator.aggregate(state, same)
    assert_equal_deltas(deltas(aggregator, found), deltas(aggregator, expected), rtol=1e-6)


@every_method
def test_a_state_is_made_of_what_a_checkpoint_can_save(name, options):
    def check(value: object) -> None:
        if isinstance(value, Mapping):
            assert all(isinstance(key, str) for key in value)
            for item in value.values():
                check(item)
        elif isinstance(value, tuple):
            for item in value:
                check(item)
        elif is_dataclass(value):
            assert type(value) in STATE_TYPES
            assert type(value).__dataclass_params__.frozen
            for field in fields(value):
                check(getattr(value, field.name))
        elif isinstance(value, torch.Tensor):
            assert not value.requires_grad
            # A checkpoint stores rows one after the other; other strides would round differently after a resume.
            assert value.stride() == torch.empty(value.shape).stride()
        else:
            assert value is None or isinstance(value, str | int | float)

    aggregator = build(name, options)
    by_columns = {
        module: LoraFactors(factors.A.T.contiguous().T, factors.B.T.contiguous().T, factors.scaling)
        for module, factors in trained(Broadcast(initial_adapter()), seed=1).items()
    }
    check(aggregator.init(initial_adapter()))
    check(aggregator.init(by_columns))
    check(after_a_round(aggregator, name))


@every_method
@every_policy
def test_spectra_are_those_of_the_change_that_the_largest_rank_receives(name, options, scaling):
    aggregator = build(name, options, scaling)
    initial = aggregator.spectra(aggregator.init(initial_adapter(scaling)))
    assert [(module, len(spectrum.S), spectrum.tail) for module, spectrum in initial.items()] == [
        (module, 0, 0.0) for module in sorted(SHAPES)
    ]
    state = after_a_round(aggregator, name)
    spectra = aggregator.spectra(state)
    rank = SERVER_RANK if name in ONE_RANK | {"zero_pad"} else 7
    assert_equal_deltas(
        {module: spectrum.delta().numpy() for module, spectrum in spectra.items()},
        deltas(aggregator, state, all_modules(rank)),
    )


@every_method
def test_updates_are_read_once_and_one_at_a_time(name, options):
    class OneShot:
        num_readers = 0

        def __iter__(self) -> Iterator[Update]:
            self.num_readers += 1
            yield from updates

    aggregator = build(name, options)
    state = after_a_round(aggregator, name)
    updates = one_round(aggregator, state, name, seed=1)
    expected = deltas(aggregator, aggregator.aggregate(state, updates))
    stream = OneShot()
    assert_equal_deltas(deltas(aggregator, aggregator.aggregate(state, stream)), expected, rtol=0)
    assert stream.num_readers == 1


@every_method
def test_nothing_is_changed_in_place_and_nothing_is_shared(name, options):
    aggregator = build(name, options)
    adapter = initial_adapter()
    state = aggregator.init(adapter)
    updates = one_round(aggregator, state, name)
    copies = [{module: factors.to(torch.float32) for module, factors in u.payload.items()} for u in updates]
    before = deltas(aggregator, state)
    after = aggregator.aggregate(state, updates)
    expected = deltas(aggregator, after)
    for update, copy in zip(updates, copies, strict=True):
        for module, factors in update.payload.items():
            assert torch.equal(factors.A, copy[module].A)
            assert torch.equal(factors.B, copy[module].B)
    broadcast = aggregator.broadcast(after, all_modules(SERVER_RANK))
    sent = [*broadcast.trainable.values(), *(broadcast.frozen or {}).values()]
    for factors in [*adapter.values(), *sent, *(f for u in updates for f in u.payload.values())]:
        factors.A.fill_(7)
        factors.B.fill_(7)
    assert_equal_deltas(deltas(aggregator, state), before, rtol=0)
    assert_equal_deltas(deltas(aggregator, after), expected, rtol=0)


@every_method
def test_gradients_do_not_reach_the_state(name, options):
    aggregator = build(name, options)
    state = aggregator.init(initial_adapter())
    updates = one_round(aggregator, state, name)
    for update in updates:
        for factors in update.payload.values():
            factors.A.requires_grad_()
            factors.B.requires_grad_()
    after = aggregator.aggregate(state, updates)
    assert not any(f.A.requires_grad for f in aggregator.broadcast(after, all_modules(SERVER_RANK)).trainable.values())


@every_method
def test_a_round_without_usable_weights_or_with_strange_modules_is_refused(name, options):
    aggregator = build(name, options)
    state = aggregator.init(initial_adapter())
    payload = aggregator.broadcast(state, all_modules(SERVER_RANK)).trainable
    with pytest.raises(AggregationError, match=r"add up to more than 0; got 0\.0"):
        aggregator.aggregate(state, iter([]))
    with pytest.raises(AggregationError, match="add up to more than 0"):
        aggregator.aggregate(state, [Update("a", payload, 0.0)])
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(FlexLoraError, match=f"got {weight} from 'a'"):
            aggregator.aggregate(state, [Update("a", payload, weight)])
    with pytest.raises(ValueError, match=r"'other\.proj' from 'a'"):
        aggregator.aggregate(state, [Update("a", {**payload, "other.proj": payload["mlp.down_proj"]}, 1.0)])


def test_every_method_keeps_the_protocol():
    for name in AGGREGATORS:
        assert isinstance(build(name, {}), Aggregator)
