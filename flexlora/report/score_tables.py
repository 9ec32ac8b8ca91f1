"""Computes the rows of every table of scores: models, categories of tasks, and clients by rank plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexlora.report.reference_names import reference_runs
from flexlora.report.scores import (
    base_evaluation,
    difference,
    finite,
    last_evaluated,
)
from flexlora.report.task_differences import (
    LEAST_CLIENTS,
    Difference,
    task_difference,
)
from flexlora.rounds.records import (
    EvaluationRecord,
    ReferenceRunRecord,
    ReferencesRecord,
    RoundRecord,
    ScoreRecord,
    TaskScoreRecord,
)
from flexlora.text import bytes_text, count_text, number_text, signed_text


@dataclass(frozen=True)
class SummaryRow:
    """One model on the unseen tasks.

    Attributes:
        difference: In ROUGE-L points to the base model, weighted by examples.
        interval: Of that difference, over tasks; None where tasks are few or not recorded.
    """

    name: str
    detail: str
    rouge_l: float | None
    rouge_l_unweighted: float | None
    exact_match: float | None
    loss: float | None
    difference: float | None
    interval: Difference | None
    up_bytes: int | None
    down_bytes: int | None


SUMMARY_COLUMNS = (
    "Model",
    "ROUGE-L",
    "unweighted",
    "exact match",
    "loss (nats)",
    "difference to base",
    "sent up",
    "sent down",
)


def summary_table(
    records: Sequence[RoundRecord], references: ReferencesRecord, method: str | None = None
) -> list[SummaryRow]:
    """Return one row per model that has been evaluated on the unseen tasks, the federated one last."""
    base = base_evaluation(records, references)
    rows = []
    if base:
        rows.append(_summary_row("Base model", "before any training", base.unseen, base, base, 0, 0))
    local = references.local_only
    if local and local.unseen:
        detail = f"mean of {count_text(len(local.clients), 'client')}"
        # Each client that trains alone is a model of its own: a few of them show nothing.
        tasks = local.tasks if len(local.clients) >= LEAST_CLIENTS else {}
        rows.append(_summary_row("Training alone", detail, local.unseen, None, base, 0, 0, tasks))
    for name, run in reference_runs(references).items():
        if run.final:
            detail = _detail(run)
            rows.append(_summary_row(name, detail, run.final.unseen, run.final, base, run.up_bytes, run.down_bytes))
    last = last_evaluated(records)
    if last and last.evaluation and last.server_round > 0:
        up = sum(record.up_bytes for record in records if record.server_round <= last.server_round)
        down = sum(record.down_bytes for record in records if record.server_round <= last.server_round)
        name = f"Federated ({method})" if method else "Federated"
        detail = f"after round {last.server_round}"
        rows.append(_summary_row(name, detail, last.evaluation.unseen, last.evaluation, base, up, down))
    return rows


def _detail(run: ReferenceRunRecord) -> str:
    among = [] if run.num_clients is None else [f"FedIT among {count_text(run.num_clients, 'client')}"]
    rate = [] if run.learning_rate is None else [f"learning rate {run.learning_rate:g}"]
    return ", ".join([*among, run.rank, *rate])


def summary_cells(row: SummaryRow) -> list[str]:
    """Return the cells of a row, written out, under `SUMMARY_COLUMNS`."""
    return [
        f"{row.name}, {row.detail}",
        number_text(row.rouge_l),
        number_text(row.rouge_l_unweighted),
        number_text(row.exact_match, unit=" %"),
        number_text(row.loss, digits=3),
        signed_text(row.difference),
        bytes_text(row.up_bytes),
        bytes_text(row.down_bytes),
    ]


def _summary_row(
    name: str,
    detail: str,
    unseen: ScoreRecord,
    evaluation: EvaluationRecord | None,
    base: EvaluationRecord | None,
    up_bytes: int,
    down_bytes: int,
    tasks: Mapping[str, TaskScoreRecord] | None = None,
) -> SummaryRow:
    own = tasks or (evaluation.tasks if evaluation else {})
    return SummaryRow(
        name=name,
        detail=detail,
        rouge_l=finite(unseen.rouge_l),
        rouge_l_unweighted=finite(evaluation.unseen_unweighted.rouge_l) if evaluation else None,
        exact_match=finite(unseen.exact_match),
        loss=finite(unseen.loss),
        difference=None if evaluation is base else difference(unseen.rouge_l, base.unseen.rouge_l if base else None),
        interval=None if base is None or evaluation is base else task_difference(own, base.tasks),
        up_bytes=up_bytes,
        down_bytes=down_bytes,
    )
