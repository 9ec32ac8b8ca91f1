"""Checks what every aggregation method must do, on any method, inside the package or outside.

Expected numbers come from numpy, from what went in, or from the method itself asked in another way (another order of
clients, other units of weight). No check knows a method by name: traits say what it may demand. Models are compared
whole, what clients train and what they do not together, because methods differ in where they put a change.

This file has the rules of averaging; what is sent and what is kept are in ``contract_messages`` and ``contract_state``.
What holds of some methods only is in ``identities``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.contract_client import as_type, in_another_gauge, ran, reply, travelling, with_own_factors
from flexlora.aggregators.contract_compare import (
    Deltas,
    best_approximation,
    change_of,
    require,
    require_best,
    require_equal,
    require_refused,
)
from flexlora.aggregators.contract_messages import (
    a_client_receives_the_same_whenever_it_asks,
    broadcasts_have_the_ranks_asked_for,
    frozen_branches_fit,
    require_alive,
    what_clients_can_make_is_what_they_would_make,
    what_clients_train_is_there,
)
from flexlora.aggregators.contract_state import (
    gradients_do_not_reach_the_state,
    it_describes_itself,
    its_states_can_be_saved,
    nothing_is_changed_or_shared,
    spectra_are_those_of_the_change,
    updates_are_read_once,
)
from flexlora.aggregators.contract_sums import a_sum_counts_as_its_cohort
from flexlora.federation.messages import Broadcast, Change, Update
from flexlora.lora.factors import LoraFactors


def one_client_is_a_fixed_point(case: Case) -> None:
    """With one client, everybody gets what it sent, as far as ranks allow, and its echo changes nothing."""
    aggregator, traits = case.aggregator, case.traits
    # A client of a sketch runs a part of the model, made larger.
    runs_all = traits.folds_tail or traits.keeps_directions or not traits.per_client
    for plan in case.plans():
        state = case.start()
        sent = case.broadcast(state, plan, "only")
        update = reply(sent, "only", 3.0, seed=1)
        state = aggregator.aggregate(state, [update])
        expected = change_of(with_own_factors(ran(sent, update)))
        # Models of clients that keep a factor have nothing in common at two ranks.
        for ranks in ([plan] if traits.personal else [plan, case.all_modules()]) if runs_all else []:
            rule = "one client must get back what it sent, and so must all others of its rank or above"
            require_kept(case, sent, state, ranks, expected, rule)
        for _ in range(2):
            before, part = case.deltas(state, plan), _trained_part(case, state, plan)
            sent = case.broadcast(state, plan, "only")
            state = aggregator.aggregate(state, [reply(sent, "only", 3.0, seed=0, step=0.0)])
            rule = "an echo of one client must change nothing"
            require_kept(case, sent, state, plan, before, rule)
            if traits.keeps_directions and not traits.fewer_directions and sent.mask is None:
                rule = "keeps_directions: an echo must give the trained part again"
                require_equal(_trained_part(case, state, plan), part, rule)


def clients_that_agree_are_one_client(case: Case) -> None:
    """If all clients send the same at the server's rank, that is the mean, whatever their number and weights."""
    state, plan = case.start(), case.all_modules()
    updates = [case.update(state, plan, f"client-{i}", 10.0 * (i + 1), seed=1) for i in range(4)]
    sent = case.broadcast(state)
    expected = change_of(with_own_factors(ran(sent, updates[0])))
    after = case.aggregator.aggregate(state, updates)
    require_kept(case, sent, after, plan, expected, "clients that agree must count as one")


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
        scaled = [replace(update, weight=factor * update.weight) for update in updates]
        rule = "only the ratios of weights must matter"
        require_equal(case.deltas(case.aggregator.aggregate(state, scaled)), first, rule)
    ghost = case.update(state, case.plans()[0], "ghost", 0.0, seed=99)
    found = case.deltas(case.aggregator.aggregate(state, [*updates, ghost]))
    require_equal(found, first, "a client of weight 0 must change nothing")


def two_halves_are_one_client(case: Case) -> None:
    """An update that comes twice with half its weight counts as it does once, where examples count."""
    if not case.traits.counts_examples:
        return
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    first = case.deltas(case.aggregator.aggregate(state, updates))
    half = replace(updates[-1], weight=updates[-1].weight / 2)
    found = case.deltas(case.aggregator.aggregate(state, [*updates[:-1], half, half]))
    require_equal(found, first, "an update must count as much as two of half its weight")


def large_changes_that_cancel_leave_the_small_ones(case: Case) -> None:
    """Two clients that pull hard in opposite ways do not hide the others, in whatever order they come."""
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    pulls = [_pull(case.broadcast(state, None, f"large{size:+}"), size) for size in (1e4, -1e4)]
    first = case.deltas(case.aggregator.aggregate(state, [*pulls, *updates]))
    again = case.deltas(case.aggregator.aggregate(state, [pulls[0], *updates, pulls[1]]))
    require_equal(again, first, "large changes that cancel must not hide small ones: add up in float64")


def payloads_of_any_precision_are_taken(case: Case) -> None:
    """Payloads of low precision are averaged without further loss."""
    state = case.after_a_round()
    updates = case.updates(state, seed=1)
    travels = travelling(case.broadcast(state))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        low = [as_type(one, dtype, travels) for one in updates]
        exact = [as_type(one, torch.float64, travels) for one in low]
        found, expected = case.aggregator.aggregate(state, low), case.aggregator.aggregate(state, exact)
        rule = f"payloads in {dtype} must be averaged as their float64 copies are"
        require_equal(case.deltas(found), case.deltas(expected), rule, rtol=1e-6)


def missing_modules_are_served_or_refused(case: Case) -> None:
    """A client that lacks modules is served those it has, or refused by an error of the package."""
    state, aggregator = case.after_a_round(), case.aggregator
    module, other = sorted(case.shapes)[-1], sorted(case.shapes)[0]
    full = case.updates(state, seed=1)
    rank = case.server_rank if case.traits.needs_one_rank else 4
    if case.traits.needs_one_rank:
        whole = case.update(state, case.all_modules(), "partial", 100.0, seed=5)
        partial = replace(whole, payload={module: whole.payload[module]})
        require_refused(lambda: aggregator.aggregate(state, [*full, partial]), "an update that lacks modules")
        return
    partial = case.update(state, {module: rank}, "partial", 100.0, seed=5)
    after = aggregator.aggregate(state, [*full, partial])
    served = list(case.broadcast(after, {module: 2}, "partial").trainable)
    require(served == [module], f"a client with one module must be sent that module alone; got {served}")
    only = [
        case.update(state, {module: plan[module]}, f"client-{i}", 10.0, seed=i) for i, plan in enumerate(case.plans())
    ]
    require_alive(case.broadcast(aggregator.aggregate(state, only), case.all_modules(3)), other)


def unusable_rounds_are_refused(case: Case) -> None:
    """A round without usable weights, or with modules that the server lacks, is refused; ``weighed`` does that."""
    aggregator, state = case.aggregator, case.start()
    usual = case.update(state, case.all_modules(), "client-0", 1.0, seed=1)
    require_refused(lambda: aggregator.aggregate(state, iter([])), "a round without updates")
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        only = replace(usual, weight=weight)
        require_refused(lambda only=only: aggregator.aggregate(state, [only]), f"a round whose only weight is {weight}")
    strange = replace(usual, payload={**usual.payload, "other.proj": next(iter(usual.payload.values()))})
    require_refused(lambda: aggregator.aggregate(state, [strange]), "an update with a module that the server lacks")


def traits_are_true(case: Case) -> None:
    """What traits claim holds: one rank, gauge invariance, a folded tail, changes that add up."""
    aggregator, traits, state = case.aggregator, case.traits, case.after_a_round()
    if traits.needs_one_rank:
        require_refused(lambda: aggregator.broadcast(state, case.all_modules(2)), "a rank that is not the server's")
    if traits.linear_in_products:
        _require_products_alone_to_matter(case)
    if traits.folds_tail:
        smallest = case.all_modules(None if traits.needs_one_rank else 1)
        require(case.broadcast(state, smallest).frozen, "folds_tail: a small rank must get a frozen branch")
    if traits.adds_changes and not traits.server_optimizer:
        echo = case.update(state, case.all_modules(), "echo", 1.0, seed=0, step=0.0)
        after = aggregator.add_changes(state, [Change(echo, case.broadcast(state, None, "echo").trainable)])
        require_equal(case.deltas(after), case.deltas(state), "adds_changes: an echo must change nothing")


def require_kept(
    case: Case, sent: Broadcast, state: object, ranks: Mapping[str, int], expected: Deltas, rule: str
) -> None:
    """Raise unless a model of these ranks is what was expected, or its best approximation where something is left out.

    That may be with the trait ``fewer_directions``; where spectra say so by their ``tail``, which then is how much; and
    after changes of whole weights, which are cut to ranks.

    Raises:
        ContractError: Naming the rule and the module.
    """
    if case.traits.server_optimizer:  # Goes a part of the way, or further.
        return
    found, spectra = case.deltas(state, ranks), case.aggregator.spectra(state)
    for module, delta in expected.items():
        one, norm = {module: found[module]}, float(np.linalg.norm(delta))
        may_lose = spectra[module].tail
        if sent.mask is not None:
            may_lose = max(may_lose, float(np.linalg.norm(delta - best_approximation(delta, ranks[module]))))
        if not case.traits.fewer_directions and may_lose <= 1e-5 * norm:
            require_equal(one, {module: delta}, rule)
            continue
        require_best(one, {module: delta}, rule)
        lost = float(np.linalg.norm(found[module] - delta))
        allowed = case.traits.fewer_directions or lost <= may_lose + 1e-5 * norm
        require(allowed, f"{rule}: {module} lost {lost:.3g}, more than the {may_lose:.3g} that its spectrum tells")


def _require_products_alone_to_matter(case: Case) -> None:
    """Raise unless other factors of the same weighted sum of products give the same."""
    aggregator, state = case.aggregator, case.after_a_round()
    updates = case.updates(state, seed=1)
    travels = travelling(case.broadcast(state))
    rule = "linear_in_products: factors (B M, M^-1 A) must give what (B, A) give"
    if travels == frozenset("AB"):
        # A mixing of its own for each client: one that all share would cancel in a mean of factors too.
        other = [replace(u, payload=in_another_gauge(u.payload, i)) for i, u in enumerate(updates)]
    else:
        rule = "linear_in_products: two clients must give what two of their mean give"
        pair = [replace(case.update(state, case.all_modules(), "client-8", 10.0, seed=seed)) for seed in (8, 9)]
        updates, other = [*updates, *pair], [*updates, *_both_in_the_middle(*pair)]
    expected = case.deltas(aggregator.aggregate(state, updates))
    require_equal(case.deltas(aggregator.aggregate(state, other)), expected, rule, rtol=1e-4)


def _both_in_the_middle(one: Update, other: Update) -> tuple[Update, Update]:
    payload = {
        module: LoraFactors((f.A + other.payload[module].A) / 2, (f.B + other.payload[module].B) / 2, f.scaling)
        for module, f in one.payload.items()
    }
    cores = one.cores and {module: (core + (other.cores or {})[module]) / 2 for module, core in one.cores.items()}
    return replace(one, payload=payload, cores=cores), replace(other, payload=payload, cores=cores)


def _pull(broadcast: Broadcast, size: float) -> Update:
    """Return an update with one large change of what travels: of ``B`` where both factors do."""
    if travelling(broadcast) == frozenset("AB"):
        broadcast = replace(broadcast, train_factors="B")
    return reply(broadcast, f"large{size:+}", 10.0, seed=7, step=size)


def _trained_part(case: Case, state: object, plan: dict[str, int]) -> Deltas:
    return change_of(with_own_factors(replace(case.broadcast(state, plan, "only"), frozen=None)))


CHECKS: tuple[Callable[[Case], None], ...] = (
    it_describes_itself,
    its_states_can_be_saved,
    broadcasts_have_the_ranks_asked_for,
    frozen_branches_fit,
    what_clients_train_is_there,
    what_clients_can_make_is_what_they_would_make,
    a_client_receives_the_same_whenever_it_asks,
    one_client_is_a_fixed_point,
    clients_that_agree_are_one_client,
    the_order_of_clients_does_not_matter,
    only_ratios_of_weights_matter,
    two_halves_are_one_client,
    large_changes_that_cancel_leave_the_small_ones,
    payloads_of_any_precision_are_taken,
    missing_modules_are_served_or_refused,
    spectra_are_those_of_the_change,
    updates_are_read_once,
    nothing_is_changed_or_shared,
    gradients_do_not_reach_the_state,
    unusable_rounds_are_refused,
    traits_are_true,
    a_sum_counts_as_its_cohort,
)
"""Every rule, in an order that names the simplest mistake first."""
