"""Returns the learning rate of a round."""

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "halve"]


def learning_rate_at(
    server_round: int,
    *,
    base: float,
    schedule: Schedule,
    num_rounds: int,
    warmup_rounds: int = 0,
    halve_at: Sequence[int] = (),
    final: float = 0.0,
) -> float:
    """Return the learning rate of all clients in a round.

    Args:
        server_round: From 1 to ``num_rounds``.
        base: The rate after warm-up.
        schedule: ``constant``; ``linear`` or ``cosine``, falling so that they would reach ``final`` one round after
            the last; ``halve``, divided by two after each round of ``halve_at``.
        num_rounds: Rounds of the whole run.
        warmup_rounds: First rounds, in which the rate rises to ``base`` in equal steps.
        halve_at: Rounds of ``halve``.
        final: Rate that ``linear`` and ``cosine`` fall to, if it is below ``base``.
    """
    if server_round <= warmup_rounds:
        return base * server_round / warmup_rounds
    if schedule == "halve":
        return base * 0.5 ** sum(server_round > halved for halved in halve_at)
    final = min(final, base)
    progress = (server_round - warmup_rounds - 1) / max(1, num_rounds - warmup_rounds)
    if schedule == "linear":
        return final + (base - final) * (1.0 - progress)
    if schedule == "cosine":
        return final + (base - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return base
