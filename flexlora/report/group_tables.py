"""Computes the tables of scores by group: categories of unseen tasks, and the clients of each rank plan."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.report.participation import plan_ranks
from flexlora.report.scores import (
    base_evaluation,
    difference,
    federated_evaluation,
    finite,
    last_evaluated,
    pooled_rouge_l,
    rouge_l_of,
)
from flexlora.report.task_differences import (
    LEAST_CLIENTS,
    LEAST_TASKS,
    Difference,
    paired_difference,
    task_difference,
)
from flexlora.rounds.records import (
    EvaluationRecord,
    LocalClientRecord,
    ManifestRecord,
    RankGroupRecord,
    ReferencesRecord,
    RoundRecord,
    ScoreRecord,
)
from flexlora.text import describe_ranks


@dataclass(frozen=True)
class CategoryRow:
    """One category of unseen tasks; ROUGE-L of each model, and federated minus base where there are enough tasks."""

    name: str
    num_tasks: int
    num_examples: int
    base: float | None
    federated: float | None
    difference: float | None
    interval: Difference | None
    fedit: float | None


@dataclass(frozen=True)
class FairnessRow:
    """ROUGE-L of at least `LEAST_CLIENTS` clients of one rank plan on their own test data, weighted by examples.

    Attributes:
        over_base: The global adapter minus the base model, over clients.
        over_local: The global adapter minus training alone, over those clients that also trained alone.
    """

    plan: str
    ranks: str
    num_clients: int
    base: float | None
    federated: float | None
    over_base: Difference | None
    local_only: float | None
    over_local: Difference | None


def category_table(records: Sequence[RoundRecord], references: ReferencesRecord) -> list[CategoryRow]:
    """Return one row per category of unseen tasks: the largest gain first, then those of too few tasks for one."""
    models = _models(records, references)
    names = sorted({name for evaluation in models if evaluation for name in evaluation.categories})
    rows = [_category_row(name, *(e.categories.get(name) if e else None for e in models)) for name in names]
    rows = [_with_interval(row, *models[:2]) for row in rows]
    return sorted(rows, key=lambda row: (-_or_least(row.difference), -_or_least(row.federated), row.name))


def total_rows(records: Sequence[RoundRecord], references: ReferencesRecord) -> list[CategoryRow]:
    """Return the two lines under the category table: weighted by examples, and the plain mean over tasks."""
    models = base, federated, _ = _models(records, references)
    if not (base or federated):
        return []
    weighted = _category_row("All, weighted by examples", *(e.unseen if e else None for e in models))
    alike = _category_row("All, each task alike", *(e.unseen_unweighted if e else None for e in models))
    interval = task_difference(federated.tasks, base.tasks) if base and federated else None
    return [_replaced(weighted, weighted.difference, interval), alike]


def fairness_table(
    records: Sequence[RoundRecord], references: ReferencesRecord, manifest: ManifestRecord | None
) -> list[FairnessRow]:
    """Return one row per rank plan of which enough clients were scored on their own test data, smallest ranks first."""
    last = last_evaluated(records)
    groups = last.evaluation.rank_groups if last and last.evaluation and last.server_round > 0 else {}
    alone = references.local_only.clients if references.local_only else []
    rows = (
        _fairness_row(plan, describe_ranks(ranks), groups.get(plan), [one for one in alone if one.plan == plan])
        for plan, ranks in plan_ranks(records, manifest).items()
    )
    return [row for row in rows if row is not None]


def _fairness_row(
    plan: str, ranks: str, group: RankGroupRecord | None, alone: Sequence[LocalClientRecord]
) -> FairnessRow | None:
    both = [one for one in alone if one.own and one.global_own]
    has_alone = len(both) >= LEAST_CLIENTS
    has_group = group is not None and group.num_clients >= LEAST_CLIENTS
    if not has_alone and not has_group:
        return None
    over_local = [
        (one.global_own.rouge_l, one.own.rouge_l, one.own.num_examples) for one in both if one.own and one.global_own
    ]
    members = group.clients if group else []
    return FairnessRow(
        plan=plan,
        ranks=ranks,
        num_clients=group.num_clients if group and has_group else len(both),
        base=rouge_l_of(group.base_own) if group and has_group else pooled_rouge_l(one.base_own for one in both),
        federated=rouge_l_of(group.own) if group and has_group else pooled_rouge_l(one.global_own for one in both),
        over_base=paired_difference(((c.rouge_l, c.base_rouge_l, c.num_examples) for c in members), LEAST_CLIENTS),
        local_only=pooled_rouge_l(one.own for one in both) if has_alone else None,
        over_local=paired_difference(over_local, LEAST_CLIENTS),
    )


def _models(
    records: Sequence[RoundRecord], references: ReferencesRecord
) -> tuple[EvaluationRecord | None, EvaluationRecord | None, EvaluationRecord | None]:
    """Return what the base, the run and FedIT at the smallest rank score."""
    fedit = references.fedit_smallest_rank.final if references.fedit_smallest_rank else None
    return base_evaluation(records, references), federated_evaluation(records), fedit


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
        interval=None,
        fedit=rouge_l_of(fedit),
    )


def _with_interval(row: CategoryRow, base: EvaluationRecord | None, federated: EvaluationRecord | None) -> CategoryRow:
    """Return the row with the interval of its gain; without a gain where it has too few tasks for one."""
    if row.num_tasks < LEAST_TASKS:
        return _replaced(row, None, None)
    scores, others = (
        {task: own for task, own in one.tasks.items() if own.category == row.name} if one else {}
        for one in (federated, base)
    )
    return _replaced(row, row.difference, task_difference(scores, others))


def _replaced(row: CategoryRow, gain: float | None, interval: Difference | None) -> CategoryRow:
    return dataclasses.replace(row, difference=gain, interval=interval)


def _or_least(value: float | None) -> float:
    return -math.inf if finite(value) is None or value is None else value
