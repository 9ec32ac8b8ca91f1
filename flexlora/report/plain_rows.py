"""Turns what a run recorded into rows of plain values, for tables of programs and for downloads."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flexlora.report.score_tables import summary_table
from flexlora.report.scores import base_evaluation, federated_evaluation
from flexlora.rounds.records import ReferencesRecord, RoundRecord

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

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


def task_rows(rounds: Sequence[RoundRecord], references: ReferencesRecord) -> list[Row]:
    """Return one row per unseen task: ROUGE-L of the base, FedIT at the smallest rank and the last evaluated round."""
    federated, base = federated_evaluation(rounds), base_evaluation(rounds, references)
    fedit = references.fedit_smallest_rank.final if references.fedit_smallest_rank else None
    models = {"base_rouge_l": base, "fedit_smallest_rank_rouge_l": fedit, "rouge_l": federated}
    tasks = {column: one.tasks if one else {} for column, one in models.items()}
    known = {task: score for own in tasks.values() for task, score in own.items()}
    return [
        {"task": task, "category": score.category, "num_examples": score.num_examples}
        | {column: own[task].rouge_l if task in own else None for column, own in tasks.items()}
        for task, score in known.items()
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a heading, lines ended as RFC 4180 has them; what was not measured is an empty cell.

    A text that a spreadsheet would take for a formula gets an apostrophe in front: names come from other people's data.
    """
    if not rows:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def json_text(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return tables as strict JSON; numbers that are not finite are null."""
    return json.dumps(
        {name: [{k: _finite(v) for k, v in row.items()} for row in rows] for name, rows in tables.items()},
        indent=1,
        allow_nan=False,
    )


def _cell(value: Any) -> Any:
    is_formula = isinstance(value, str) and value.lstrip(" ")[:1] in FORMULA_STARTS
    return "'" + value if is_formula and value.strip() else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
