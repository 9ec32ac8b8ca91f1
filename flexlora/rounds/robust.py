"""Aggregates the updates of a round so that a few clients that lie do little harm."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from flexlora.aggregators.base import PrivateAggregator
from flexlora.errors import FlexLoraError
from flexlora.federation.messages import Change, Update
from flexlora.federation.streams import stream, stream_seed
from flexlora.lora.change import change_gram
from flexlora.rounds.cohort import Work
from flexlora.rounds.loop_parts import Loop, Stopwatch
from flexlora.rounds.outcomes import starts_of
from flexlora.rounds.records import RobustRecord, rounded
from flexlora.uplink.base import receive
from flexlora.uplink.robust_settings import RobustSettings
from flexlora.uplink.robust_weights import robust_multipliers


def robustly_aggregated(
    loop: Loop,
    settings: RobustSettings,
    server_round: int,
    work: Work,
    state: Any,
    updates: Iterator[Update],
    watch: Stopwatch,
) -> tuple[Any, str | None, RobustRecord | None]:
    """Return the state after the updates that are believed, what is worth a note, and who was believed how far.

    Those that are believed in part add that part of their change, the others their update; each counts the same.
    """
    rng = torch.Generator().manual_seed(stream_seed(loop.settings.seed, "uplink", server_round))
    try:
        changes = [
            Change(dataclasses.replace(one, weight=1.0), start)
            for one, start in starts_of(work, receive(loop.uplink, updates, rng), "rounds.robust")
        ]
        least = loop.settings.min_updates
        if len(changes) < least:
            return state, f"{len(changes)} clients survived, of {least} at least; the state was kept", None
        with watch.stage("aggregate"):
            gram = change_gram([(change.start, change.update.payload) for change in changes])
            multipliers = robust_multipliers(
                settings, gram, stream(loop.settings.seed, "robust", server_round)
            ).tolist()
            believed = [(change, share) for change, share in zip(changes, multipliers, strict=True) if share > 0]
            if all(share == 1 for _, share in believed):
                state = loop.aggregator.aggregate(state, (change.update for change, _ in believed))
            else:
                state = _scaled(loop, state, believed)
    except FlexLoraError as error:
        for _ in updates:  # those that nobody asked for belong into the records too
            pass
        return state, f"the updates could not be aggregated and the state was kept: {error}", None
    shares = {str(change.update.client_id): rounded(share) for change, share in zip(changes, multipliers, strict=True)}
    return state, None, RobustRecord(rule=settings.rule, shares=shares)


def _scaled(loop: Loop, state: Any, believed: list[tuple[Change, float]]) -> Any:
    """Return the state moved by the mean of the scaled changes."""
    assert isinstance(loop.aggregator, PrivateAggregator), "the configuration is checked"
    changes = (dataclasses.replace(change, discount=share) for change, share in believed)
    return loop.aggregator.add_noisy_changes(state, changes, float(len(believed)), _no_noise)


def _no_noise(name: str, height: int, width: int) -> torch.Tensor:
    return torch.zeros(height, width, dtype=torch.float64)
