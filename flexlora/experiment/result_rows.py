"""Turns what a run recorded into rows of plain values, one kind of row per table."""

from collections.abc import Sequence
from typing import Any

from flexlora.report.score_tables import summary_table
from flexlora.rounds.records import ClientRecord, ReferencesRecord, RoundRecord
from flexlora.text import describe_ranks

Row = dict[str, Any]
"""Column -> value; the rows of a table have the same columns. What was not measured is None."""


def score_rows(rounds: Sequence[RoundRecord], references: ReferencesRecord, method: str | None = None) -> list[Row]:
    """Return one row per model that has been scored on the unseen tasks, the federated one last."""
    return [
        {
            "model": row.name,
            "detail": row.detail,
            "rouge_l": row.rouge_l,
            "rouge_l_unweighted": row.rouge_l_unweighted,
            "exact_match": row.exact_match,
            "loss": row.loss,
            "difference_to_base": row.difference,
            "up_bytes": row.up_bytes,
            "down_bytes": row.down_bytes,
        }
        for row in summary_table(rounds, references, method)
    ]


def round_rows(rounds: Sequence[RoundRecord]) -> list[Row]:
    """Return one row per round; scores are None in rounds that were not evaluated."""
    rows = []
    for record in rounds:
        scores = record.evaluation
        rows.append(
            {
                "server_round": record.server_round,
                "learning_rate": record.learning_rate,
                "num_ok": record.num_ok,
                "num_failed": record.num_failed,
                "train_loss": record.train_loss,
                "rouge_l": scores.unseen.rouge_l if scores else None,
                "exact_match": scores.unseen.exact_match if scores else None,
                "loss": scores.unseen.loss if scores else None,
                "validation_loss": scores.validation_loss if scores else None,
                "energy_above_smallest": record.energy_above_smallest,
                "up_bytes": record.up_bytes,
                "down_bytes": record.down_bytes,
                "seconds": record.seconds.get("total"),
                "virtual_clock_seconds": record.virtual_clock_seconds,
                "note": record.note,
            }
        )
    return rows


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
