"""Turns what a run recorded of its clients into rows of plain values."""

from collections.abc import Sequence

from flexlora.report.plain_rows import Row
from flexlora.rounds.records import ClientRecord, RoundRecord
from flexlora.text import describe_ranks


def client_rows(rounds: Sequence[RoundRecord]) -> list[Row]:
    """Return one row per round and client that took part."""
    return [_client_row(record.server_round, client) for record in rounds for client in record.clients]


def _client_row(server_round: int, client: ClientRecord) -> Row:
    return {
        "server_round": server_round,
        "client_id": client.client_id,
        "plan": client.plan,
        "ranks": describe_ranks(client.ranks),
        "largest_rank": max(client.ranks.values(), default=0),
        "num_examples": client.num_examples,
        "outcome": client.outcome,
        "stage": client.stage,
        "reason": client.reason,
        "loss": client.loss,
        "steps": client.steps,
        "up_bytes": client.up_bytes,
        "down_bytes": client.down_bytes,
        "device": client.device,
        "virtual_seconds": client.virtual_seconds,
        "staleness": client.staleness,
    }
