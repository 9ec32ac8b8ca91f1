"""Computes the rows of every table of scores: models, categories of tasks, and clients by rank plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.report.participation import plan_ranks
from flexlora.report.reference_names import reference_runs
from flexlora.report.scores import (
    base_evaluation,
    difference,
    federated_evaluation,
    finite,
    last_evaluated,
    pooled_rouge_l,
    rouge_l_of,
)
from flexlora.rounds.records import (
    EvaluationRecord,
    ManifestRecord,
    ReferenceRunRecord,
    ReferencesRecord,
    RoundRecord,
    ScoreRecord,
)
from flexlora.text import bytes_text, count_text, describe_ranks, number_text, signed_text


@dataclass(frozen=True)
class SummaryRow:
    """One model on the unseen tasks; ``difference`` is in ROUGE-L points to the base model, weighted by examples."""

    name: str
    detail: str
    rouge_l: float | None
    rouge_l_unweighted: float | None
    exact_match: float | None
    loss: float | None
    difference: float | None
    up_bytes: int | None
    down_bytes: int | None


@dataclass(frozen=True)
class CategoryRow:
    """One category of unseen tasks; ROUGE-L of each model, and federated minus base."""

    name: str
    num_tasks: int
    num_examples: int
    base: float | None
    federated: float | None
    difference: float | None
    fedit: float | None


@dataclass(frozen=True)
class FairnessRow:
    """ROUGE-L of one rank plan's clients on their own test data, and of its rank on the unseen tasks."""

    plan: str
    ranks: str
    num_clients: int
    base: float | None
    local_only: float | None
    federated: float | None
    gain_over_base: float | None
    gain_over_local: float | None
    unseen: float | None


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
        rows.append(_summary_row("Training alone", detail, local.unseen, None, base, 0, 0))
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
) -> SummaryRow:
    return SummaryRow(
        name=name,
        detail=detail,
        rouge_l=finite(unseen.rouge_l),
        rouge_l_unweighted=finite(evaluation.unseen_unweighted.rouge_l) if evaluation else None,
        exact_match=finite(unseen.exact_match),
        loss=finite(unseen.loss),
        difference=None if evaluation is base else difference(unseen.rouge_l, base.unseen.rouge_l if base else None),
        up_bytes=up_bytes,
        down_bytes=down_bytes,
    )


def category_table(records: Sequence[RoundRecord], references: ReferencesRecord) -> list[CategoryRow]:
    """Return one row per category of unseen tasks, best gain first."""
    base = base_evaluation(records, references)
    fedit = references.fedit_smallest_rank.final if references.fedit_smallest_rank else None
    federated = federated_evaluation(records)
    evaluations = [evaluation for evaluation in (federated, base, fedit) if evaluation]
    names = sorted({name for evaluation in evaluations for name in evaluation.categories})
    rows = [
        _category_row(name, *(e.categories.get(name) if e else None for e in (base, federated, fedit)))
        for name in names
    ]
    return sorted(rows, key=lambda row: (-(row.difference if row.difference is not None else -math.inf), row.name))


def total_rows(records: Sequence[RoundRecord], references: ReferencesRecord) -> list[CategoryRow]:
    """Return the two lines under the category table: weighted by examples, and the plain mean over tasks."""
    base = base_evaluation(records, references)
    federated = federated_evaluation(records)
    fedit = references.fedit_smallest_rank.final if references.fedit_smallest_rank else None
    if not (base or federated):
        return []
    return [
        _category_row("All, weighted by examples", *(e.unseen if e else None for e in (base, federated, fedit))),
        _category_row("All, each task alike", *(e.unseen_unweighted if e else None for e in (base, federated, fedit))),
    ]


def _category_row(
    name: str, base: ScoreRecord | None, federated: ScoreRecord | None, fedit: ScoreRecord | None
) -> CategoryRow:
    sizes = [score for score in (federated, base, fedit) if score]
    return CategoryRow(
        name=name,
        num_tasks=sizes[0].num_tasks,
        num_examples=sizes[0].num_examples,
        base=rouge_l_of(base),
        federated=rouge_l_of(federated),
        difference=difference(rouge_l_of(federated), rouge_l_of(base)),
        fedit=rouge_l_of(fedit),
    )


def fairness_table(
    records: Sequence[RoundRecord], references: ReferencesRecord, manifest: ManifestRecord | None
) -> list[FairnessRow]:
    """Return one row per rank plan for which own test data were scored, smallest ranks first.

    Where clients of the plan also trained alone, all three scores are of exactly those clients; otherwise base and
    federated are of the rank groups of the evaluation. Scores are weighted by examples.
    """
    last = last_evaluated(records)
    groups = last.evaluation.rank_groups if last and last.evaluation and last.server_round > 0 else {}
    rows = []
    for plan, ranks in plan_ranks(records, manifest).items():
        local_clients = [c for c in references.local_only.clients if c.plan == plan] if references.local_only else []
        alone = pooled_rouge_l(client.own for client in local_clients)
        if any(client.global_own for client in local_clients):
            num_clients = len(local_clients)
            federated = pooled_rouge_l(client.global_own for client in local_clients)
            before = pooled_rouge_l(client.base_own for client in local_clients)
        else:
            num_clients = groups[plan].num_clients if plan in groups else len(local_clients)
            federated = rouge_l_of(groups[plan].own) if plan in groups else None
            before = rouge_l_of(groups[plan].base_own) if plan in groups else None
        unseen = rouge_l_of(groups[plan].unseen) if plan in groups else None
        if all(score is None for score in (alone, federated, before, unseen)):
            continue
        rows.append(
            FairnessRow(
                plan=plan,
                ranks=describe_ranks(ranks),
                num_clients=num_clients,
                base=before,
                local_only=alone,
                federated=federated,
                gain_over_base=difference(federated, before),
                gain_over_local=difference(federated, alone),
                unseen=unseen,
            )
        )
    return rows
