"""Trains a cohort and aggregates it in the way of a loop: one by one, as a secure sum, privately, or robustly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexlora.federation.messages import KeptFactors
from flexlora.rounds.cohort import Work
from flexlora.rounds.loop_parts import Loop, Stopwatch
from flexlora.rounds.outcomes import aggregated, checked, trained
from flexlora.rounds.private import Release, privately_aggregated
from flexlora.rounds.records import ClientRecord
from flexlora.rounds.robust import robustly_aggregated
from flexlora.rounds.summed import summed
from flexlora.uplink.compression import without_memory


@dataclass(frozen=True)
class AggregatedRound:
    """What came of the training of a cohort.

    Attributes:
        state: Of the aggregator, the one before where nothing could be aggregated.
        note: What went wrong, or is worth a note; None if nothing.
        clients: A record of every client.
        kept: Client id -> the factor that it keeps.
        parts: Fields of the round's record that only some ways of aggregating have.
        release: What was made public under differential privacy.
    """

    state: Any
    note: str | None
    clients: list[ClientRecord]
    kept: Mapping[str, KeptFactors] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    release: Release | None = None

    @property
    def kept_by_clients(self) -> dict[str, KeptFactors]:
        """Return client id -> what it keeps; nothing of what rounding lost if the state has no update in it."""
        if self.note is None:
            return dict(self.kept)
        others = {client_id: without_memory(kept) for client_id, kept in self.kept.items()}
        return {client_id: kept for client_id, kept in others.items() if kept}

    @property
    def num_ok(self) -> int:
        """Return how many clients' updates are in the state."""
        return sum(client.outcome == "ok" for client in self.clients) if self.note is None else 0


def aggregate_cohort(loop: Loop, server_round: int, work: Work, state: Any, watch: Stopwatch) -> AggregatedRound:
    """Return what came of a round's training, in the way of aggregating that the loop has."""
    outcomes = trained(loop.engine, work.orders, watch)
    clients: list[ClientRecord] = []
    kept: dict[str, KeptFactors] = {}
    if loop.secure_sum is not None:
        state, note, record = summed(loop, server_round, work, state, outcomes, clients, watch)
        return AggregatedRound(state, note, clients, parts={"secure_sum": record})
    updates = checked(loop, server_round, work, outcomes, clients, kept)
    if loop.privacy is not None:
        state, note, release = privately_aggregated(loop, loop.privacy, server_round, work, state, updates, watch)
        return AggregatedRound(state, note, clients, kept, {"privacy": release.record}, release)
    if loop.robust is not None:
        state, note, believed = robustly_aggregated(loop, loop.robust, server_round, work, state, updates, watch)
        return AggregatedRound(state, note, clients, kept, {"robust": believed})
    state, note = aggregated(loop, server_round, work, state, updates, watch)
    return AggregatedRound(state, note, clients, kept)
