"""Lists what makes the numbers of a comparison less certain than they look."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flexlora.report.chosen_rates import UNTRAINED, ChosenRate
from flexlora.report.measures import went_wrong
from flexlora.report.study_rows import Row
from flexlora.text import count_text

EDGES = {
    "lowest": "is the lowest that was tried; a lower one may be better",
    "highest": "is the highest that was tried; a higher one may be better",
    "only": "is the only one that was tried on all tuning draws",
}


@dataclass(frozen=True)
class Flag:
    """One reservation; ``kind`` is one of edge, diverged, failed, missing, rate, personal, versions."""

    distribution: str
    arm: str
    kind: str
    detail: str


def study_flags(
    rows: Sequence[Row], runs: Sequence[Row], rates: Mapping[tuple[str, str], ChosenRate], reference: str
) -> Iterator[Flag]:
    """Yield every reservation about a comparison.

    Args:
        rows: All of them.
        runs: The test rows that count.
        rates: See `chosen_rates`.
        reference: The arm that differences are to.
    """
    yield from _rate_flags(runs, rates)
    yield from _wrong_flags(runs)
    yield from _missing_flags(runs, reference)
    for arm, where in dict.fromkeys((row["arm"], row["distribution"]) for row in runs if row.get("personal")):
        yield Flag(
            where,
            arm,
            "personal",
            "its clients keep a part of the model, so unseen tasks see the shared part alone and validation is on the "
            "clients' own data; compare it by the loss on the clients' own test data",
        )
    versions = sorted({str(row.get("version")) for row in runs})
    if len(versions) > 1:
        yield Flag("all", "all", "versions", f"rows come from several versions: {', '.join(versions)}")


def _rate_flags(runs: Sequence[Row], rates: Mapping[tuple[str, str], ChosenRate]) -> Iterator[Flag]:
    for choice in rates.values():
        rate = f"{choice.learning_rate:g}"
        if choice.edge is not None:
            yield Flag(choice.distribution, choice.arm, "edge", f"learning rate {rate} {EDGES[choice.edge]}")
        if choice.chosen.num_diverged:
            bad = f"{choice.chosen.num_diverged} of {choice.chosen.num_draws} tuning runs"
            yield Flag(choice.distribution, choice.arm, "diverged", f"{bad} at the chosen rate {rate} went wrong")
    tested = {(row["arm"], row["distribution"]): row["learning_rate"] for row in runs if row["arm"] != UNTRAINED}
    for (arm, where), rate in tested.items():
        chosen = rates.get((arm, where))
        if chosen is not None and chosen.learning_rate != rate:
            detail = f"test runs are at learning rate {rate:g}, tuning prefers {chosen.learning_rate:g}"
            yield Flag(where, arm, "rate", detail)


def _wrong_flags(runs: Sequence[Row]) -> Iterator[Flag]:
    failures: defaultdict[tuple[str, str, str, str], list[int]] = defaultdict(list)
    for row in runs:
        if row.get("failure"):
            failures[row["distribution"], row["arm"], "failed", str(row["failure"])].append(row["draw"])
        elif went_wrong(row):
            failures[row["distribution"], row["arm"], "diverged", "the loss grew out of bounds"].append(row["draw"])
    for (where, arm, kind, why), draws in failures.items():
        places = ", ".join(map(str, sorted(draws)))
        word = "draw" if len(draws) == 1 else "draws"
        yield Flag(where, arm, kind, f"{word} {places}: {why}; counted as the worst value of the draw")


def _missing_flags(runs: Sequence[Row], reference: str) -> Iterator[Flag]:
    draws: defaultdict[str, defaultdict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for row in runs:
        draws[row["distribution"]][row["arm"]].add(row["draw"])
    for where, arms in draws.items():
        if reference not in arms:
            yield Flag(where, reference, "missing", "the reference has no test run, so there are no paired differences")
        every = set().union(*arms.values())
        for arm, own in arms.items():
            if len(own) < len(every):
                detail = f"{count_text(len(own), 'draw')} of {len(every)}; missing {_listed(every - own)}"
                yield Flag(where, arm, "missing", detail)


def _listed(draws: set[int]) -> str:
    shown = sorted(draws)
    return ", ".join(map(str, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
