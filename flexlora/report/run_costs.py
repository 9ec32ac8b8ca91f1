"""Says what the runs of a comparison cost."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields

from flexlora.report.study_rows import Row, number

POOLED = "centralised"
"""The control on one machine; rows of older versions have the bytes of a client that it only seems to have."""


@dataclass(frozen=True)
class Costs:
    """Cost of one run, over the runs that ended without a failure; None where it was not recorded.

    Bytes are means. Seconds are medians, which a run that was stopped for a while does not move; they are wall time of
    the machine of the run, so they compare arms, not machines.
    """

    up_bytes: float | None
    down_bytes: float | None
    server_seconds: float | None
    client_seconds: float | None
    seconds: float | None


def typical_costs(runs: Iterable[Row]) -> dict[tuple[str, str], Costs]:
    """Return (distribution, arm) -> the cost of a run; what moves data and no factors has no bytes."""
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in runs:
        if not row.get("failure"):
            own = dict(row, up_bytes=0, down_bytes=0) if row["arm"] == POOLED else row
            groups[row["distribution"], row["arm"]].append(own)
    return {key: Costs(*(_typical(group, field.name) for field in fields(Costs))) for key, group in groups.items()}


def _typical(rows: list[Row], key: str) -> float | None:
    known = [value for row in rows if (value := number(row.get(key))) is not None]
    if not known:
        return None
    return statistics.median(known) if key.endswith("seconds") else sum(known) / len(known)
