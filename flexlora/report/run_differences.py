"""Compares runs: each with the first over the tasks of both, and arms over the seeds that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexlora.report.falls import Best, best_of, best_validation_round
from flexlora.report.pair_statistics import PairStatistics, pair_statistics
from flexlora.report.run_folder import RunFolder
from flexlora.report.run_settings import Arm
from flexlora.report.scores import federated_evaluation, finite
from flexlora.report.task_differences import Difference, task_difference
from flexlora.text import count_text, number_text, signed_text

SAME_DATA = ("unseen",)
"""Hashes of a manifest that two runs must share for a difference of their scores to mean anything."""


@dataclass(frozen=True)
class RunRow:
    """One run of a comparison.

    Attributes:
        to_first: Its last ROUGE-L minus that of the first run, over tasks; None for the first, and for runs that were
            scored on other tasks.
        validation: Round and loss of its lowest validation loss.
    """

    name: str
    arm: str
    style: str
    method: str
    seed: int | None
    num_rounds: int
    best: Best | None
    to_first: Difference | None
    validation: tuple[int, float] | None
    num_bytes: int
    seconds: float
    machine: str


@dataclass(frozen=True)
class SeedRow:
    """One arm minus the first over the seeds of both; ``seeds`` are those that count."""

    arm: str
    first: str
    measure: str
    digits: int
    seeds: Sequence[int]
    pairs: PairStatistics

    @property
    def is_told(self) -> bool:
        """Whether the interval leaves zero out."""
        low, high = self.pairs.low, self.pairs.high
        return low is not None and high is not None and (low > 0 or high < 0)

    @property
    def interval(self) -> str:
        """The 95 % interval by Student's t, empty for one seed."""
        if self.pairs.low is None or self.pairs.high is None:
            return ""
        return f"{signed_text(self.pairs.low, self.digits)} to {signed_text(self.pairs.high, self.digits)}"


def run_rows(runs: Mapping[str, RunFolder], arms: Sequence[Arm]) -> list[RunRow]:
    """Return one row per run, in order."""
    arm_of = {run: place for place, arm in enumerate(arms) for run in arm.runs.values()}
    first = next(iter(runs.values()))
    rows = []
    for name, run in runs.items():
        manifest = run.manifest
        rows.append(
            RunRow(
                name=name,
                arm=arms[arm_of[name]].name,
                style=f"c{1 + arm_of[name] % 6}",
                method=manifest.method if manifest else "unknown",
                seed=manifest.seed if manifest else None,
                num_rounds=run.records[-1].server_round if run.records else 0,
                best=best_of(run.records),
                to_first=None if run is first else _over_tasks(run, first),
                validation=best_validation_round(run.records),
                num_bytes=sum(record.up_bytes + record.down_bytes for record in run.records),
                seconds=sum(record.seconds.get("total", 0.0) for record in run.records),
                machine=(manifest.machine if manifest else None) or "",
            )
        )
    return rows


def _over_tasks(run: RunFolder, first: RunFolder) -> Difference | None:
    own, other = federated_evaluation(run.records), federated_evaluation(first.records)
    if own is None or other is None or not same_data(run, first):
        return None
    return task_difference(own.tasks, other.tasks)


def same_data(run: RunFolder, other: RunFolder) -> bool:
    """Return whether two runs were scored on the same unseen tasks, as far as is recorded."""
    if run.manifest is None or other.manifest is None:
        return False
    hashes = run.manifest.data_hashes, other.manifest.data_hashes
    return run.manifest.base_model == other.manifest.base_model and all(
        hashes[0].get(key) == hashes[1].get(key) for key in SAME_DATA
    )


def seed_rows(runs: Mapping[str, RunFolder], arms: Sequence[Arm]) -> list[SeedRow]:
    """Return each arm minus the first over shared seeds, by ROUGE-L and by loss; none where no arm has two seeds."""
    if not arms or max(len(arm.runs) for arm in arms) < 2:
        return []
    first, rows = arms[0], []
    for arm in arms[1:]:
        shared = [
            seed for seed in arm.runs if seed in first.runs and same_data(runs[arm.runs[seed]], runs[first.runs[seed]])
        ]
        for measure, field, digits in (("ROUGE-L, points", "rouge_l", 1), ("Loss, nats per token", "loss", 3)):
            scored = [(seed, _score(runs, arm, seed, field), _score(runs, first, seed, field)) for seed in shared]
            present = [(seed, own - other) for seed, own, other in scored if own is not None and other is not None]
            if present:
                pairs = pair_statistics([value for _, value in present])
                rows.append(SeedRow(arm.name, first.name, measure, digits, [seed for seed, _ in present], pairs))
    return rows


def _score(runs: Mapping[str, RunFolder], arm: Arm, seed: int, field: str) -> float | None:
    scored = federated_evaluation(runs[arm.runs[seed]].records)
    return finite(getattr(scored.unseen, field)) if scored else None


def comparison_in_words(rows: Sequence[RunRow], seeds: Sequence[SeedRow]) -> str:
    """Return who is ahead in a sentence or two: over seeds where there are several, else over tasks."""
    by_rouge = [row for row in seeds if row.digits == 1 and row.pairs.low is not None]
    if by_rouge:
        return " ".join(_seed_sentence(row) for row in by_rouge[:3])
    told = [(row, row.to_first) for row in rows if row.to_first is not None]
    if told:
        return " ".join(_task_sentence(row.name, rows[0].name, difference) for row, difference in told[:3])
    return (
        "No run can be compared with the first by a difference: they share fewer than 8 unseen tasks, or one has no "
        "score yet."
    )


def _seed_sentence(row: SeedRow) -> str:
    claim = "" if row.is_told else ", which includes zero: not told apart"
    over = f"over {count_text(len(row.seeds), 'seed')}{claim}"
    return f"{row.arm} {_ends(row.pairs.mean, row.first)} (95 % interval {row.interval} {over})."


def _task_sentence(name: str, first: str, difference: Difference) -> str:
    claim = "" if difference.is_told else ", which includes zero: not told apart"
    return (
        f"{name} {_ends(difference.value, first)} (95 % interval "
        f"{signed_text(difference.low)} to {signed_text(difference.high)} over "
        f"{count_text(difference.num_units, 'task')} of one run each{claim})."
    )


def _ends(points: float, first: str) -> str:
    """Return where a run ends beside the first, as "ends 2.0 points of ROUGE-L above plain"."""
    size = number_text(abs(points))
    if size == number_text(0.0):
        return f"ends level with {first} in ROUGE-L"
    return f"ends {size} points of ROUGE-L {'above' if points > 0 else 'below'} {first}"
