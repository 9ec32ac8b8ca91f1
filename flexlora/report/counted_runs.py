"""Picks the test runs of a comparison that count: one a draw, each arm at one learning rate."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from flexlora.report.chosen_rates import ChosenRate
from flexlora.report.study_rows import Row


def counted_runs(rows: Sequence[Row], rates: Mapping[tuple[str, str], ChosenRate]) -> list[Row]:
    """Return the test rows of every arm and distribution at the learning rate that was chosen.

    Where no test run has that rate, or none was chosen, the rate with the most test runs counts, of equal ones the
    lowest.
    """
    groups: defaultdict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["phase"] == "test":
            groups[row["arm"], row["distribution"]].append(row)
    kept = []
    for key, group in groups.items():
        counts = Counter(row["learning_rate"] for row in group)
        rate = rates[key].learning_rate if key in rates else None
        if rate not in counts:
            rate = min(counts, key=lambda tried: (-counts[tried], tried))
        kept += [row for row in group if row["learning_rate"] == rate]
    return kept
