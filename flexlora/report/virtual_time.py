"""Follows a run on the virtual clock: its score at each time, and when it reached a target."""

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.report.scores import finite
from flexlora.rounds.records import EvaluationRecord, ManifestRecord, ReferenceRunRecord, RoundRecord
from flexlora.text import bytes_text, number_text, seconds_text


@dataclass(frozen=True)
class TimedPoint:
    """One evaluation: virtual seconds since the start, unseen ROUGE-L, and nats on the validation set."""

    seconds: float
    rouge_l: float | None
    validation_loss: float | None


@dataclass(frozen=True)
class TimedRun:
    """A run on the virtual clock; None stands for what a reference run does not record."""

    name: str
    policy: str
    points: Sequence[TimedPoint]
    num_rounds: int
    seconds: float
    num_ok: int | None
    num_failed: int | None
    up_bytes: int
    down_bytes: int
    base_rouge_l: float | None

    @property
    def best_rouge_l(self) -> float | None:
        """The best unseen ROUGE-L of all its evaluations."""
        return max((point.rouge_l for point in self.points if point.rouge_l is not None), default=None)

    @property
    def has_learned(self) -> bool:
        """Whether it ever scored above its base model, as far as that was scored."""
        best = self.best_rouge_l
        return best is not None and (self.base_rouge_l is None or best > self.base_rouge_l)

    def seconds_to(self, target: float | None) -> float | None:
        """Return the virtual time of the first evaluation that reached ``target``; None if none has."""
        if target is None:
            return None
        reached = (p.seconds for p in self.points if p.rouge_l is not None and p.rouge_l >= target)
        return next(reached, None)


def timed_run(name: str, records: Sequence[RoundRecord], manifest: ManifestRecord | None) -> TimedRun | None:
    """Return a run on the virtual clock; None if it had none."""
    timed = [record for record in records if record.virtual_clock_seconds is not None]
    if not timed:
        return None
    base = next((record.evaluation for record in records if record.server_round == 0), None)
    return TimedRun(
        name=name,
        policy=(manifest.policy if manifest else None) or "unknown",
        points=[
            _point(record.virtual_clock_seconds or 0.0, record.evaluation) for record in timed if record.evaluation
        ],
        num_rounds=timed[-1].server_round,
        seconds=timed[-1].virtual_clock_seconds or 0.0,
        num_ok=sum(record.num_ok for record in timed),
        num_failed=sum(record.num_failed for record in timed),
        up_bytes=sum(record.up_bytes for record in timed),
        down_bytes=sum(record.down_bytes for record in timed),
        base_rouge_l=finite(base.unseen.rouge_l) if base else None,
    )


def timed_reference(name: str, policy: str, run: ReferenceRunRecord) -> TimedRun | None:
    """Return a reference run on the virtual clock; None if it had none."""
    timed = [scored for scored in run.evaluations if scored.virtual_clock_seconds is not None]
    if not timed:
        return None
    return TimedRun(
        name=name,
        policy=policy,
        points=[TimedPoint(s.virtual_clock_seconds or 0.0, finite(s.unseen.rouge_l), None) for s in timed],
        num_rounds=timed[-1].server_round,
        seconds=timed[-1].virtual_clock_seconds or 0.0,
        num_ok=None,
        num_failed=None,
        up_bytes=run.up_bytes,
        down_bytes=run.down_bytes,
        base_rouge_l=next((finite(s.unseen.rouge_l) for s in run.evaluations if s.server_round == 0), None),
    )


def common_target(runs: Sequence[TimedRun], target: float | None = None) -> float | None:
    """Return ``target``, or else the highest ROUGE-L that every run that learned has reached; None if none has learned.

    A run has learned if it ever scored above its base model. Runs that never did have no influence: with them the
    target would be the score of the base.
    """
    if target is not None:
        return target
    best = [run.best_rouge_l for run in runs if run.has_learned]
    return min((value for value in best if value is not None), default=None)


VIRTUAL_COLUMNS = ("run", "policy", "rounds", "used", "left out", "sent", "best", "time")


def virtual_cells(run: TimedRun, target: float | None) -> list[str]:
    """Return the cells of a run, written out, under `VIRTUAL_COLUMNS` and one for its time to ``target``."""
    reached = run.seconds_to(target)
    return [
        run.name,
        run.policy,
        number_text(run.num_rounds, 0),
        number_text(run.num_ok, 0),
        number_text(run.num_failed, 0),
        bytes_text(run.up_bytes + run.down_bytes),
        number_text(run.best_rouge_l),
        seconds_text(run.seconds),
        "not reached" if reached is None and target is not None else seconds_text(reached),
    ]


def _point(seconds: float, evaluation: EvaluationRecord) -> TimedPoint:
    return TimedPoint(seconds, finite(evaluation.unseen.rouge_l), finite(evaluation.validation_loss))
