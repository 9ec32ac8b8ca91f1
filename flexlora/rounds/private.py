"""Aggregates the updates of a round under differential privacy of clients, and keeps account of it.

What the state learns of a round is the noisy sum of clipped changes, whoever came: nobody at all still means noise, and
how many came decides nothing. A client that fails counts as one that was not sampled.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from flexlora.aggregators.base import PrivateAggregator
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Change, Update
from flexlora.federation.streams import stream_seed
from flexlora.rounds.cohort import Work
from flexlora.rounds.loop_parts import Loop, Privacy, PrivacySpent, Stopwatch
from flexlora.rounds.outcomes import starts_of
from flexlora.rounds.records import PrivacyRecord, rounded
from flexlora.uplink.base import receive
from flexlora.uplink.clip_and_noise import ClipTally, clipped, next_clip, round_noise
from flexlora.uplink.privacy_budget import epsilon_of, with_round


@dataclass(frozen=True)
class Release:
    """What a round made public, and what that cost.

    Attributes:
        spent: Where the run stands now.
        record: For the record of the round.
        stopped: Why the run may not go on; None if it may.
    """

    spent: PrivacySpent
    record: PrivacyRecord
    stopped: str | None


def privately_aggregated(
    loop: Loop, privacy: Privacy, server_round: int, work: Work, state: Any, updates: Iterator[Update], watch: Stopwatch
) -> tuple[Any, str | None, Release]:
    """Return the state after the noisy sum of clipped changes, what is worth a note, and what was released.

    ``updates`` is used up in any case. The round is accounted for even if the state had to be kept.
    """
    assert isinstance(loop.aggregator, PrivateAggregator), "the configuration is checked"
    mechanism, before = privacy.mechanism, work.progress.privacy or PrivacySpent(privacy.mechanism.clip)
    tally, train_seconds, note = ClipTally(), watch.seconds.get("train", 0.0), None
    drawn, num_noised = round_noise(mechanism, before.clip, server_round), 0

    def noise(name: str, height: int, width: int) -> torch.Tensor:
        """Return the noise of one matrix and count its entries."""
        nonlocal num_noised
        num_noised += height * width
        return drawn(name, height, width)

    rng = torch.Generator().manual_seed(stream_seed(loop.settings.seed, "uplink", server_round))
    try:
        with watch.stage("aggregate"):
            received = starts_of(work, receive(loop.uplink, updates, rng), "privacy.differential")
            changes = (Change(update, start) for update, start in received)
            bounded = clipped(changes, before.clip, mechanism.space, tally)
            state = loop.aggregator.add_noisy_changes(state, bounded, mechanism.denominator, noise)
        note = None if tally.norms else "no client survived; the state has the noise of the round alone"
    except FlexLoraError as error:
        note = f"the updates could not be aggregated and the state was kept: {error}"
    # The aggregator waits for clients while it folds; that time is theirs.
    watch.seconds["aggregate"] -= watch.seconds.get("train", 0.0) - train_seconds
    for _ in updates:
        pass
    spending = with_round(before.spending, mechanism.noise_multiplier)
    spent = PrivacySpent(
        next_clip(mechanism, before.clip, tally, server_round), spending, epsilon_of(privacy.budget, spending)
    )
    record = PrivacyRecord(
        epsilon=rounded(spent.epsilon),
        delta=privacy.budget.delta,
        noise_multiplier=rounded(mechanism.noise_multiplier),
        clip=rounded(before.clip),
        num_clipped=len(tally.norms) - tally.num_within,
        median_norm=rounded(median(tally.norms)) if tally.norms else None,
        num_noised=num_noised,
        noise_deviation=rounded(mechanism.sum_multiplier * before.clip / mechanism.denominator),
    )
    is_last = server_round >= loop.settings.num_rounds
    return state, note, Release(spent, record, None if is_last else over_budget(privacy, spent))


def over_budget(privacy: Privacy, spent: PrivacySpent) -> str | None:
    """Return why there may be no other round: it would exceed the target. None if there may."""
    target = privacy.budget.target_epsilon
    if target is None:
        return None
    after = epsilon_of(privacy.budget, with_round(spent.spending, privacy.mechanism.noise_multiplier))
    if after <= target:
        return None
    return (
        f"the privacy budget is spent: epsilon {spent.epsilon:.4g} at delta {privacy.budget.delta:g}, and another "
        f"round would make it {after:.4g} (privacy.differential.target_epsilon={target:g})"
    )
