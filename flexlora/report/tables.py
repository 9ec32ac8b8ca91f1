"""Records -> rows: every table of the report and of the command line, and how a number is written in one."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexlora.rounds.records import (
    ClientRecord,
    EvaluationRecord,
    ManifestRecord,
    ReferencesRecord,
    RoundRecord,
    ScoreRecord,
    SpectrumRecord,
)
from flexlora.text import NONE, bytes_text, count_text, describe_ranks, number_text, signed_text


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
class PlanRow:
    """The clients of one rank plan: how many, how often in a round, and what they moved."""

    plan: str
    ranks: str
    num_clients: int | None
    num_sampled: int
    num_never_sampled: int | None
    num_ok: int
    num_failed: int
    num_examples: int
    up_bytes: int
    down_bytes: int
    up_bytes_each: float | None
    down_bytes_each: float | None


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


@dataclass(frozen=True)
class TimeRow:
    """Wall time of one stage over all rounds; ``share`` (0 to 1) is of the time of all stages."""

    stage: str
    seconds: float
    seconds_each: float
    share: float


@dataclass(frozen=True)
class FailureRow:
    """One client that was left out of one round."""

    server_round: int
    client_id: str
    plan: str
    stage: str
    reason: str


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
    fedit = references.fedit_smallest_rank
    if fedit and fedit.final:
        name = "FedIT at the smallest rank"
        detail = fedit.rank
        if fedit.learning_rate is not None:
            detail += f", learning rate {fedit.learning_rate:g}"
        rows.append(_summary_row(name, detail, fedit.final.unseen, fedit.final, base, fedit.up_bytes, fedit.down_bytes))
    last = last_evaluated(records)
    if last and last.evaluation and last.server_round > 0:
        up = sum(record.up_bytes for record in records if record.server_round <= last.server_round)
        down = sum(record.down_bytes for record in records if record.server_round <= last.server_round)
        name = f"Federated ({method})" if method else "Federated"
        detail = f"after round {last.server_round}"
        rows.append(_summary_row(name, detail, last.evaluation.unseen, last.evaluation, base, up, down))
    return rows


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
    last = last_evaluated(records)
    fedit = references.fedit_smallest_rank.final if references.fedit_smallest_rank else None
    federated = last.evaluation if last and last.server_round > 0 else None
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
    last = last_evaluated(records)
    federated = last.evaluation if last and last.server_round > 0 else None
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
        base=_rouge_l(base),
        federated=_rouge_l(federated),
        difference=difference(_rouge_l(federated), _rouge_l(base)),
        fedit=_rouge_l(fedit),
    )


def plan_table(records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> list[PlanRow]:
    """Return one row per rank plan, smallest ranks first."""
    by_plan: defaultdict[str, list[ClientRecord]] = defaultdict(list)
    for client in _participations(records):
        by_plan[client.plan].append(client)
    ranks = plan_ranks(records, manifest)
    rows = []
    for plan, module_ranks in ranks.items():
        clients = by_plan[plan]
        ok = [client for client in clients if client.outcome == "ok"]
        num_sampled = len({client.client_id for client in clients})
        num_clients = manifest.plan_counts.get(plan) if manifest else None
        up_bytes = sum(client.up_bytes for client in clients)
        down_bytes = sum(client.down_bytes for client in clients)
        rows.append(
            PlanRow(
                plan=plan,
                ranks=describe_ranks(module_ranks),
                num_clients=num_clients,
                num_sampled=num_sampled,
                num_never_sampled=None if num_clients is None else max(num_clients - num_sampled, 0),
                num_ok=len(ok),
                num_failed=len(clients) - len(ok),
                num_examples=sum(client.num_examples for client in ok),
                up_bytes=up_bytes,
                down_bytes=down_bytes,
                up_bytes_each=sum(client.up_bytes for client in ok) / len(ok) if ok else None,
                down_bytes_each=sum(client.down_bytes for client in ok) / len(ok) if ok else None,
            )
        )
    return rows


def times_sampled(records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> dict[str, Counter[int]]:
    """Return plan name -> how many of its clients were sampled 0, 1, 2, ... times.

    Clients that were never sampled are counted only when the manifest says how many clients there are.
    """
    times = Counter((client.plan, client.client_id) for client in _participations(records))
    counts = {plan: Counter[int]() for plan in plan_ranks(records, manifest)}
    for (plan, _), sampled in times.items():
        counts[plan][sampled] += 1
    for plan, histogram in counts.items():
        never = (manifest.plan_counts.get(plan, 0) if manifest else 0) - histogram.total()
        if never > 0:
            histogram[0] = never
    return counts


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
            federated = _rouge_l(groups[plan].own) if plan in groups else None
            before = _rouge_l(groups[plan].base_own) if plan in groups else None
        unseen = _rouge_l(groups[plan].unseen) if plan in groups else None
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


def time_table(records: Sequence[RoundRecord]) -> list[TimeRow]:
    """Return one row per stage that was timed, in the order of a round, without the total."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for record in records:
        for stage, value in record.seconds.items():
            if stage != "total" and math.isfinite(value):
                seconds[stage].append(value)
    whole = sum(sum(values) for values in seconds.values())
    return [
        TimeRow(stage, sum(values), sum(values) / len(values), sum(values) / whole if whole else 0.0)
        for stage, values in sorted(seconds.items(), key=lambda item: (_stage_order(item[0]), item[0]))
    ]


def failure_table(records: Sequence[RoundRecord]) -> list[FailureRow]:
    """Return every failure, in the order in which they happened."""
    return [
        FailureRow(record.server_round, client.client_id, client.plan, client.stage or NONE, client.reason or NONE)
        for record in records
        for client in record.clients
        if client.outcome == "failed"
    ]


def truncation_error(spectrum: SpectrumRecord, rank: int) -> float | None:
    """Return the share (0 to 1) of the Frobenius norm that the best approximation of ``rank`` leaves out.

    ``sqrt(sum_{k > rank} sigma_k^2 + tail^2) / sqrt(sum_k sigma_k^2 + tail^2)`` (Eckart-Young); None for a module
    whose change is zero or not finite.
    """
    tail = spectrum.tail * spectrum.tail
    left_out = math.fsum(value * value for value in spectrum.singular_values[rank:]) + tail
    whole = math.fsum(value * value for value in spectrum.singular_values[:rank]) + left_out
    return math.sqrt(left_out / whole) if whole > 0 and math.isfinite(whole) else None


def base_evaluation(records: Sequence[RoundRecord], references: ReferencesRecord) -> EvaluationRecord | None:
    """Return how the base model alone does: the reference, or else what round 0 measured."""
    if references.base:
        return references.base
    return records[0].evaluation if records and records[0].server_round == 0 else None


def last_evaluated(records: Sequence[RoundRecord]) -> RoundRecord | None:
    """Return the last round that was evaluated."""
    return next((record for record in reversed(records) if record.evaluation), None)


def plan_ranks(records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> dict[str, dict[str, int]]:
    """Return plan name -> module path -> rank, smallest ranks first; from the clients where there is no manifest."""
    ranks = dict(manifest.plan_ranks) if manifest else {}
    for client in _participations(records):
        ranks.setdefault(client.plan, client.ranks)
    return dict(sorted(ranks.items(), key=lambda item: (sum(item[1].values()), item[0])))


def pooled_rouge_l(scores: Iterable[ScoreRecord | None]) -> float | None:
    """Return the mean ROUGE-L weighted by examples, leaving out what is missing or not finite."""
    present = [score for score in scores if score and math.isfinite(score.rouge_l) and score.num_examples]
    weight = sum(score.num_examples for score in present)
    return sum(score.rouge_l * score.num_examples for score in present) / weight if weight else None


def difference(value: float | None, other: float | None) -> float | None:
    """Return ``value - other``, or None if either is missing or not finite."""
    return finite(value - other) if value is not None and other is not None else None


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else None


def _rouge_l(score: ScoreRecord | None) -> float | None:
    return finite(score.rouge_l) if score else None


def _participations(records: Sequence[RoundRecord]) -> Iterable[ClientRecord]:
    return (client for record in records for client in record.clients)


def _stage_order(stage: str) -> int:
    order = ("broadcast", "train", "aggregate", "spectra", "evaluate", "checkpoint")
    return order.index(stage) if stage in order else len(order)
