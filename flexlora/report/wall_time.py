"""Sums the wall time of a run by stage."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.rounds.records import RoundRecord


@dataclass(frozen=True)
class TimeRow:
    """Wall time of one stage over all rounds; ``share`` (0 to 1) is of the time of all stages."""

    stage: str
    seconds: float
    seconds_each: float
    share: float


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


def _stage_order(stage: str) -> int:
    order = ("broadcast", "train", "aggregate", "spectra", "evaluate", "checkpoint")
    return order.index(stage) if stage in order else len(order)
