"""Cuts sequences of different lengths into passes, so that padding and passes together cost least."""

from collections.abc import Sequence

PASS_TOKENS = {"cpu": 96, "cuda": 1024}
"""What one more pass costs before its first token, in tokens.

Measured with a small model on a CPU, estimated for GPUs, where launching kernels takes longer and a token less time.
"""


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
