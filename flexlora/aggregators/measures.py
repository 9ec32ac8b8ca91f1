"""Measures what averaging costs a method: bias, dependence on gauge, what an echo changes, and how much is sent.

Measures, not rules: a method may have any of these on purpose. References are dense float64 sums by numpy. All of a
model counts, what clients train and what they do not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import hypot

import numpy as np

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.contract_client import in_another_gauge, travelling
from flexlora.aggregators.contract_compare import Deltas, best_approximation
from flexlora.aggregators.identities import exchange, mean_of_models
from flexlora.federation.known_rows import num_chosen
from flexlora.federation.messages import Broadcast


@dataclass(frozen=True)
class Axes:
    """What one round of a method is like, after one round before it.

    Attributes:
        bias: ``||W - W*|| / ||W*||`` of the new model of the server's rank, ``W*`` the mean of what clients ran.
        least_bias: That of the best approximation of ``W*`` at the server's rank, the least without a frozen branch.
        change_bias: The same with ``W* = G + (mean of the changes that clients made)``: what a method aims at that
            keeps what it did not send.
        gauge_change: ``||W' - W|| / ||W||`` when every client writes its change as ``(B M, M^-1 A)``; None where
            clients cannot, because they do not return both factors.
        echo_error: ``||G+ - G|| / ||G||`` when every client returns what it was sent.
        floats_down: Numbers sent to a client, mean over clients.
        floats_up: Numbers that a client sends, mean over clients.
    """

    bias: float
    least_bias: float
    change_bias: float
    gauge_change: float | None
    echo_error: float
    floats_down: float
    floats_up: float


def axes(case: Case, step: float = 0.3) -> Axes:
    """Return the measures of a method.

    Args:
        case: The method, its clients and its modules.
        step: Standard deviation of what training adds to every trained entry; much larger than the entries, it makes
            factors that have nothing in common.
    """
    state = case.after_a_round()
    whole, aggregate = case.all_modules(case.global_rank), case.aggregator.aggregate
    sent, updates = exchange(case, state, seed=1, step=step)
    wanted = mean_of_models(sent, updates)
    found = case.deltas(aggregate(state, updates), whole)
    _, echoes = exchange(case, state, seed=0, step=0.0)
    before, were_sent = case.deltas(state, whole), mean_of_models(sent, echoes)
    moved = {module: before[module] + delta - were_sent[module] for module, delta in wanted.items()}
    best = {module: best_approximation(delta, case.global_rank) for module, delta in wanted.items()}
    gauge_change = None
    if travelling(sent[0]) == frozenset("AB"):
        turned = [replace(update, payload=in_another_gauge(update.payload, i)) for i, update in enumerate(updates)]
        gauge_change = distance(case.deltas(aggregate(state, turned), whole), found)
    return Axes(
        bias=distance(found, wanted),
        least_bias=distance(best, wanted),
        change_bias=distance(found, moved),
        gauge_change=gauge_change,
        echo_error=distance(case.deltas(aggregate(state, echoes), whole), before),
        floats_down=float(np.mean([floats_down(one) for one in sent])),
        floats_up=float(np.mean([floats_up(one) for one in sent])),
    )


def distance(found: Deltas, wanted: Deltas) -> float:
    """Return ``||found - wanted|| / ||wanted||`` in the Frobenius norm over all modules together."""
    return _norm(found[module] - wanted[module] for module in wanted) / _norm(wanted.values())


def floats_down(broadcast: Broadcast) -> int:
    """Return how many numbers a client has to be sent: ``rank * (in + out)`` of a module, less what it can make itself.

    Known rows of ``A`` are not sent, nor are the entries of ``B`` outside a mask. A core has ``rank * rank``; a frozen
    branch has both factors.
    """
    trainable = sum(
        _numbers(broadcast, module, {"A", "B"} - ({"A"} if broadcast.known_A is not None else set()))
        for module in broadcast.trainable
    )
    cores = sum(core.numel() for core in (broadcast.cores or {}).values())
    frozen = sum(factors.rank * sum(factors.shape) for factors in (broadcast.frozen or {}).values())
    return trainable + cores + frozen


def floats_up(broadcast: Broadcast) -> int:
    """Return how many numbers a client sends back: what it trained and does not keep."""
    return sum(_numbers(broadcast, module, travelling(broadcast)) for module in broadcast.trainable)


def _numbers(broadcast: Broadcast, module: str, parts: Iterable[str]) -> int:
    """Return how many numbers some parts of a module have, of ``A``, ``B`` and ``core``."""
    factors = broadcast.trainable[module]
    out_features, in_features = factors.shape
    in_B = out_features * factors.rank
    if broadcast.mask is not None:
        in_B = num_chosen(broadcast.mask, (out_features, factors.rank))
    sizes = {"A": factors.rank * in_features, "B": in_B, "core": factors.rank**2}
    return sum(sizes[part] for part in parts)


def _norm(deltas: Iterable[np.ndarray]) -> float:
    return hypot(*(float(np.linalg.norm(delta)) for delta in deltas))
