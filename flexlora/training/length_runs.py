"""Cuts sequences of different lengths into passes, so that padding and passes together cost least."""

from collections.abc import Sequence

LARGER_BASE = 20_000_000
"""From so many parameters on, a base counts as a larger one where it is on a CPU: a token there takes milliseconds."""

LARGER = "cpu, larger base"

PASS_TOKENS = {"cpu": 96, LARGER: 24, "cuda": 1024}
"""What one more pass costs before its first token, in tokens.

Measured with two models on a CPU, estimated for GPUs, where launching kernels takes longer and a token less time.
"""


def pace_of(device_type: str, num_parameters: int) -> str:
    """Return the key of ``PASS_TOKENS``, and of other tables of what passes cost, for a base on a device."""
    return LARGER if device_type == "cpu" and num_parameters >= LARGER_BASE else device_type


def cheapest_runs(lengths: Sequence[int], most: int, pass_tokens: int) -> list[slice]:
    """Return runs of neighbours, in order, each to be padded to its longest, at the least cost.

    Args:
        lengths: In tokens; sorted ones need the least padding.
        most: Most sequences of a run.
        pass_tokens: What one more run costs, in padded tokens.
    """
    cheapest: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(lengths) + 1):
        longest, costs = 0, []
        for start in range(end - 1, max(0, end - most) - 1, -1):
            longest = max(longest, lengths[start])
            costs.append((cheapest[start][0] + (end - start) * longest + pass_tokens, start))
        cheapest.append(min(costs))
    runs, end = [], len(lengths)
    while end:
        start = cheapest[end][1]
        runs.append(slice(start, end))
        end = start
    return runs[::-1]
