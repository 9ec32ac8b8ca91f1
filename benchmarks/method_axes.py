"""Prints what averaging costs each method: bias, gauge, echo, numbers sent, and the server's time.

One round of clients of ranks 2, 2, 4, 8, 8 and 16 after one round before it, two modules. Methods for one rank run with
16 for all. Numbers are relative to the norm of what they are compared with (``flexlora.aggregators.measures``):

    bias       the new model against the mean of what clients ran; training adds noise of 0.1 to every entry
    least      the least that any method of the largest rank can have
    moved      against the old model plus the mean of the changes that clients made
    far bias   as bias, with noise of 10: factors that have nothing in common
    gauge      what changes when clients write their changes as (B M, M^-1 A); - where they cannot
    echo       what changes when clients return what they were sent
    aggr ms, send ms   ``aggregate``, and ``broadcast`` for one client; the least of five
    k down, k up       numbers a client is sent and sends back, in thousands, mean over clients

    python benchmarks/method_axes.py [METHOD ...]
"""

import sys
import time
from collections.abc import Callable

from flexlora.aggregators.contract_case import Case
from flexlora.aggregators.measures import axes
from flexlora.aggregators.registry import AGGREGATORS, package_methods

RANKS = (2, 2, 4, 8, 8, 16)
SHAPES = {"attn.q_proj": (96, 96), "mlp.down_proj": (96, 160)}
SMALL_STEP, LARGE_STEP = 0.1, 10.0
VARIANTS = [("flexlora", {"error_compensation": True}), ("flexlora", {"error_compensation": True, "fold_tail": True})]


def least_seconds(call: Callable[[], object], repetitions: int = 5) -> float:
    """Return the shortest time that a call took, in seconds."""
    times: list[float] = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def row(case: Case) -> list[str]:
    """Return the numbers of a method as text."""
    small, large = axes(case, SMALL_STEP), axes(case, LARGE_STEP)
    state, aggregator = case.after_a_round(), case.aggregator
    updates = case.updates(state, seed=1)
    aggregate = least_seconds(lambda: aggregator.aggregate(state, updates))
    broadcast = least_seconds(lambda: case.broadcast(state))
    gauge = "-" if small.gauge_change is None else f"{small.gauge_change:.3f}"
    return [
        f"{small.bias:.3f}",
        f"{small.least_bias:.3f}",
        f"{small.change_bias:.3f}",
        f"{large.bias:.3f}",
        gauge,
        f"{small.echo_error:.3f}",
        f"{1e3 * aggregate:.1f}",
        f"{1e3 * broadcast:.1f}",
        f"{small.floats_down / 1e3:.1f}",
        f"{small.floats_up / 1e3:.1f}",
    ]


def main(names: list[str]) -> None:
    """Print the table, one line a method as it is ready."""
    head = ["bias", "least", "moved", "far bias", "gauge", "echo", "aggr ms", "send ms", "k down", "k up"]
    print("| method | " + " | ".join(head) + " |", "|" + " --- |" * (len(head) + 1), sep="\n")
    for name, options in [*((name, {}) for name in package_methods()), *VARIANTS]:
        if not names or name in names:
            case = Case(AGGREGATORS[name], options, shapes=SHAPES, client_ranks=RANKS)
            print(f"| {' '.join([name, *options])} | " + " | ".join(row(case)) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
