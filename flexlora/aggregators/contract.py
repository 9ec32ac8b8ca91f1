"""Checks what every aggregation method must do, on any method, inside the package or outside.

Expected numbers come from numpy, from what went in, or from the method itself asked in another way (another order of
clients, other units of weight). No check knows a method by name: traits say what it may demand.
"""

import dataclasses
from collections.abc import Callable

import torch

from flexlora.aggregators.base import Aggregator, check_state, state_types
from flexlora.aggregators.contract_case import (
    SERVER_RANK,
    SHAPES,
    Case,
    OneShot,
    all_modules,
    as_type,
    change_of,
    in_another_gauge,
    initial_adapter,
    is_frozen,
    require,
    require_equal,
    require_refused,
    tensors_of,
    trained,
)
from flexlora.aggregators.settings import options_of
from flexlora.federation.messages import Broadcast, Change, Update
from flexlora.lora.factors import LoraFactors


def it_describes_itself(case: Case) -> None:
    """A method is a frozen dataclass with described options, and keeps the protocol."""
    name = case.method.__name__
    require(dataclasses.is_dataclass(case.method), f"{name} must be a dataclass")
    require(is_frozen(case.method), f"{name} must be frozen: write @dataclass(frozen=True)")
    require((case.method.__doc__ or "").strip(), f"{name} needs a docstring that says what it does, with its source")
    for option_name, option in options_of(case.method).items():
        require(option.description, f"{name}.{option_name} needs a description: write option(DEFAULT, DESCRIPTION)")
    require(isinstance(case.aggregator, Aggregator), f"{name} must have init, aggregate, broadcast and spectra")
    adds = hasattr(case.aggregator, "add_changes")
    require(adds or not case.traits.adds_changes, f"{name} needs add_changes, as its traits say adds_changes")
    sends = hasattr(case.aggregator, "broadcast_to")
    require(sends or not case.traits.per_client, f"{name} needs broadcast_to, as its traits say per_client")


def its_states_can_be_saved(case: Case) -> None:
    """A state holds nothing but what a checkpoint saves: frozen dataclasses, tensors as they lie in a file."""
    types = state_types(case.aggregator)
    for kind in types:
        require(is_frozen(kind), f"{kind.__name__}, part of a state, must be a frozen dataclass")
    by_columns = {
        module: LoraFactors(factors.A.T.contiguous().T, factors.B.T.contiguous().T, factors.scaling)
        for module, factors in trained(Broadcast(initial_adapter(case.scaling)), seed=1).items()
    }
    for make in (case.start, lambda: case.aggregator.init(by_columns), case.after_a_round):
        state = make()
        check_state(state, types)
        for name, tensor in tensors_of(state):
            require(not tensor.requires_grad, f"{name} of a state must not require a gradient")
            rows = torch.empty(tensor.shape).stride()
            require(
                tensor.stride() == rows, f"{name} of a state must be contiguous, or it rounds differently when resumed"
            )


def broadcasts_have_the_ranks_asked_for(case: Case) -> None:
    """A broadcast has exactly the modules, ranks, shapes and scalings asked for, in float32, and can learn."""
    state = case.after_a_round()
    for rank in [SERVER_RANK] if case.traits.needs_one_rank else range(1, SERVER_RANK + 1):
        trainable = case.aggregator.broadcast(state, all_modules(rank)).trainable
        require(list(trainable) == sorted(SHAPES), f"modules must be {sorted(SHAPES)}, sorted; got {list(trainable)}")
        for module, factors in trainable.items():
            shapes = (tuple(factors.A.shape), tuple(factors.B.shape))
            expected = ((rank, SHAPES[module][1]), (SHAPES[module][0], rank))
            require(
                shapes == expected, f"{module}: A and B at rank {rank} must have the shapes {expected}; got {shapes}"
            )
            scaling = case.scaling(rank)
            require(factors.scaling == scaling, f"{module}: scaling must be {scaling}; got {factors.scaling}")
            require(factors.A.dtype == factors.B.dtype == torch.float32, f"{module}: factors must be float32")
            alive = factors.A.any(dim=1) | factors.B.any(dim=0)
            require(alive.all(), f"{module}: a direction that is zero in A and B can never learn")


def one_client_is_a_fixed_point(case: Case) -> None:
    """With one client, the next broadcast is what it sent, and stays so when it only echoes."""
    if case.traits.server_optimizer:
        return
    for plan in case.plans():
        aggregator, state = case.aggregator, case.start()
        sent = aggregator.broadcast(state, plan)
        payload = trained(sent, seed=1)
        state = aggregator.aggregate(state, [Update("only", payload, weight=3.0)])
        expected = change_of(Broadcast(payload, sent.frozen))
        require_equal(case.deltas(state, plan), expected, "one client must get back what it sent")
        echo = aggregator.broadcast(state, plan).trainable
        state = aggregator.aggregate(state, [Update("only", echo, weight=3.0)])
        require_equal(case.deltas(state, plan), expected, "an echo of one client must change nothing")


def the_order_of_clients_does_not_matter(case: Case) -> None:
    """Updates in another order give the same."""
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    first = case.deltas(case.aggregator.aggregate(state, updates))
    again = case.deltas(case.aggregator.aggregate(state, updates[::-1]))
    require_equal(again, first, "the order of clients must not matter")


def only_ratios_of_weights_matter(case: Case) -> None:
    """Weights in another unit give the same, and a client of weight zero changes nothing."""
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    first = case.deltas(case.aggregator.aggregate(state, updates))
    for factor in (1e-6, 1e6):
        scaled = [Update(update.client_id, update.payload, factor * update.weight) for update in updates]
        rule = "only the ratios of weights must matter"
        require_equal(case.deltas(case.aggregator.aggregate(state, scaled)), first, rule)
    ghost = Update("ghost", trained(case.aggregator.broadcast(state, case.plans()[0]), seed=99), weight=0.0)
    found = case.deltas(case.aggregator.aggregate(state, [*updates, ghost]))
    require_equal(found, first, "a client of weight 0 must change nothing")


def payloads_of_any_precision_are_taken(case: Case) -> None:
    """Payloads of low precision are averaged without further loss."""
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = [Update(one.client_id, as_type(one.payload, dtype), one.weight) for one in updates]
        exact = [Update(one.client_id, as_type(one.payload, torch.float64), one.weight) for one in low]
        found, expected = case.aggregator.aggregate(state, low), case.aggregator.aggregate(state, exact)
        rule = f"payloads in {dtype} must be averaged as their float64 copies are"
        require_equal(case.deltas(found), case.deltas(expected), rule, rtol=1e-6)


def missing_modules_are_served_or_refused(case: Case) -> None:
    """A client that lacks modules is served those it has, or refused by an error of the package."""
    state = case.after_a_round()
    full = case.updates(state, seed=1)
    partial = Update("partial", {"mlp.down_proj": full[1].payload["mlp.down_proj"]}, weight=100.0)
    if case.traits.needs_one_rank:
        require_refused(lambda: case.aggregator.aggregate(state, [*full, partial]), "an update that lacks modules")
        return
    after = case.aggregator.aggregate(state, [*full, partial])
    served = list(case.aggregator.broadcast(after, {"mlp.down_proj": 2}).trainable)
    require(served == ["mlp.down_proj"], f"a client with one module must be sent that module alone; got {served}")
    only = [Update(one.client_id, {"mlp.down_proj": one.payload["mlp.down_proj"]}, one.weight) for one in full]
    factors = case.aggregator.broadcast(case.aggregator.aggregate(state, only), all_modules(3)).trainable["attn.q_proj"]
    alive = factors.A.any(dim=1) | factors.B.any(dim=0)
    require(alive.all(), "a module that nobody sent must still be able to learn")


def spectra_are_those_of_the_change(case: Case) -> None:
    """Spectra are sorted by module, and none before round 1; their product is what the largest rank receives."""
    state = case.after_a_round()
    spectra = case.aggregator.spectra(state)
    require(list(spectra) == sorted(SHAPES), f"spectra must have the modules {sorted(SHAPES)}; got {list(spectra)}")
    rank = SERVER_RANK if case.traits.needs_one_rank or case.traits.server_rank is None else case.traits.server_rank
    expected = case.deltas(state, all_modules(rank))
    require_equal(
        {module: spectrum.delta().numpy() for module, spectrum in spectra.items()},
        expected,
        "spectra must be those of what a client of the server's rank receives",
    )


def updates_are_read_once(case: Case) -> None:
    """Updates arrive as a stream: they are read once, one at a time, and not counted beforehand."""
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    expected = case.deltas(case.aggregator.aggregate(state, updates))
    stream = OneShot(updates)
    found = case.deltas(case.aggregator.aggregate(state, stream))
    require_equal(found, expected, "a stream of updates must give what a list gives", rtol=0.0)
    require(stream.num_readers == 1, f"updates must be read once; they were read {stream.num_readers} times")


def nothing_is_changed_or_shared(case: Case) -> None:
    """A state shares no memory with what came in or goes out, and nothing that came in is changed."""
    aggregator, adapter = case.aggregator, initial_adapter(case.scaling)
    state = aggregator.init(adapter)
    updates = case.updates(state)
    copies = [as_type(update.payload, torch.float32) for update in updates]
    before = case.deltas(state)
    after = aggregator.aggregate(state, updates)
    expected = case.deltas(after)
    for update, copy in zip(updates, copies, strict=True):
        for module, factors in update.payload.items():
            same = torch.equal(factors.A, copy[module].A) and torch.equal(factors.B, copy[module].B)
            require(same, f"{module}: aggregate must not change the updates it is given")
    broadcast: Broadcast = aggregator.broadcast(after, all_modules(SERVER_RANK))
    adapters = [adapter, broadcast.trainable, broadcast.frozen or {}, *(update.payload for update in updates)]
    for factors in (factors for adapter in adapters for factors in adapter.values()):
        factors.A.fill_(7)
        factors.B.fill_(7)
    require_equal(case.deltas(state), before, "a state must not share memory with what came in or went out", rtol=0.0)
    require_equal(case.deltas(after), expected, "a state must not share memory with what came in or went out", rtol=0.0)


def gradients_do_not_reach_the_state(case: Case) -> None:
    """Factors that still require a gradient leave none behind."""
    state = case.start()
    updates = case.updates(state)
    for update in updates:
        for factors in update.payload.values():
            factors.A.requires_grad_()
            factors.B.requires_grad_()
    after = case.aggregator.aggregate(state, updates)
    sent = case.aggregator.broadcast(after, all_modules(SERVER_RANK)).trainable
    require(not any(factors.A.requires_grad for factors in sent.values()), "a state must not require a gradient")


def unusable_rounds_are_refused(case: Case) -> None:
    """A round without usable weights, or with modules that the server lacks, is refused; ``weighed`` does that."""
    aggregator, state = case.aggregator, case.start()
    payload = aggregator.broadcast(state, all_modules(SERVER_RANK)).trainable
    require_refused(lambda: aggregator.aggregate(state, iter([])), "a round without updates")
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        only = Update("a", payload, weight)
        require_refused(lambda only=only: aggregator.aggregate(state, [only]), f"a round whose only weight is {weight}")
    strange = Update("a", {**payload, "other.proj": payload["mlp.down_proj"]}, 1.0)
    require_refused(lambda: aggregator.aggregate(state, [strange]), "an update with a module that the server lacks")


def traits_are_true(case: Case) -> None:
    """What traits claim holds: one rank, gauge invariance, a folded tail, changes that add up."""
    aggregator, traits, state = case.aggregator, case.traits, case.after_a_round()
    updates = case.updates(state, seed=1)
    if traits.needs_one_rank:
        require_refused(lambda: aggregator.broadcast(state, all_modules(2)), "a rank that is not the server's")
    if traits.linear_in_products:
        # A mixing of its own for each client: one that all share would cancel in a mean of factors too.
        turned = [Update(u.client_id, in_another_gauge(u.payload, i), u.weight) for i, u in enumerate(updates)]
        expected = case.deltas(aggregator.aggregate(state, updates))
        rule = "linear_in_products: factors (B M, M^-1 A) must give what (B, A) give"
        require_equal(case.deltas(aggregator.aggregate(state, turned)), expected, rule, rtol=1e-4)
    if traits.folds_tail:
        require(aggregator.broadcast(state, all_modules(1)).frozen, "folds_tail: a small rank must get a frozen branch")
    if traits.adds_changes and not traits.server_optimizer:
        echo = aggregator.broadcast(state, all_modules(SERVER_RANK)).trainable
        after = aggregator.add_changes(state, [Change(Update("echo", echo, 1.0), echo)])
        require_equal(case.deltas(after), case.deltas(state), "adds_changes: an echo must change nothing")


CHECKS: tuple[Callable[[Case], None], ...] = (
    it_describes_itself,
    its_states_can_be_saved,
    broadcasts_have_the_ranks_asked_for,
    one_client_is_a_fixed_point,
    the_order_of_clients_does_not_matter,
    only_ratios_of_weights_matter,
    payloads_of_any_precision_are_taken,
    missing_modules_are_served_or_refused,
    spectra_are_those_of_the_change,
    updates_are_read_once,
    nothing_is_changed_or_shared,
    gradients_do_not_reach_the_state,
    unusable_rounds_are_refused,
    traits_are_true,
)
"""Every rule, in an order that names the simplest mistake first."""
