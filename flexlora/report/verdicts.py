"""Says which arm of a comparison is first, or which are tied for first.

The arm that looks best is compared with every other contender, and Holm's correction is over all these comparisons on
all distributions. A winner is named only if its difference to the runner-up has a corrected p below `ALPHA` and the
power wanted. Arms further behind can still be untold from it, because their runs scatter more; they are named too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flexlora.report.measures import Measure, Scores
from flexlora.report.pair_statistics import ALPHA, POWER_WANTED, PairStatistics, holm, pair_statistics

OUT_OF_REACH = ("fedit_largest", "centralised")
"""Controls that show what could be had if all clients could afford the largest rank, or shared their data.

They are shown, but cannot win: no client of the study could run them.
"""


@dataclass(frozen=True)
class Rival:
    """A contender behind the first: first minus rival, paired by draw, with Holm's p over all rivals of the table."""

    arm: str
    pairs: PairStatistics
    p_holm: float | None

    @property
    def is_separated(self) -> bool:
        """Whether the difference is told with enough certainty and power to say so."""
        return (
            self.p_holm is not None
            and self.p_holm < ALPHA
            and self.pairs.power is not None
            and self.pairs.power >= POWER_WANTED
        )


@dataclass(frozen=True)
class Verdict:
    """Who is first on one distribution by one measure.

    Attributes:
        first: The contender with the best mean, over the draws that it shares with the one they are all compared by.
        rivals: All other contenders, best first.
        left_out: Contenders that are not ranked: too few draws, or a run went wrong.
    """

    distribution: str
    measure: str
    first: str
    rivals: tuple[Rival, ...]
    left_out: tuple[str, ...] = ()

    @property
    def untold(self) -> tuple[Rival, ...]:
        """Rivals that cannot be told from the first, best first."""
        return tuple(rival for rival in self.rivals if not rival.is_separated)

    @property
    def winner(self) -> str | None:
        """The first, if it can be told from the runner-up."""
        return self.first if self.rivals and self.rivals[0].is_separated else None

    @property
    def tied(self) -> tuple[str, ...]:
        """The rivals that share the first place; none if there is a winner."""
        return () if self.winner else tuple(rival.arm for rival in self.untold)

    @property
    def is_early(self) -> bool:
        """Whether the first and the next share a single draw, which ranks nobody."""
        return bool(self.rivals) and self.rivals[0].pairs.num_pairs < 2

    @property
    def runner_up(self) -> Rival | None:
        """The rival closest behind."""
        return self.rivals[0] if self.rivals else None


def verdicts(
    scores: Scores, measure: Measure, reference: str, wrong: Collection[tuple[str, str]] = ()
) -> dict[str, Verdict]:
    """Return distribution -> who is first, for each with a contender.

    Args:
        scores: Of all arms.
        measure: Which they are of.
        reference: By which arms are compared with one another where it has all draws.
        wrong: (distribution, arm) of those with a run that went wrong. What such a run counts as depends on the other
            arms, so it must not make its own arm look good.
    """
    ranked = {}
    for distribution in dict.fromkeys(distribution for distribution, _ in scores):
        arms = {arm: values for (where, arm), values in scores.items() if where == distribution}
        failed = tuple(arm for arm in arms if (distribution, arm) in wrong and arm not in OUT_OF_REACH)
        order, few = _order({arm: own for arm, own in arms.items() if arm not in failed}, measure, reference)
        left_out = (*few, *failed)
        if order:
            pairs = [(arm, pair_statistics(differences(arms[order[0]], arms[arm]))) for arm in order[1:]]
            ranked[distribution] = order[0], pairs, left_out
    tested = [(where, arm, pairs.p) for where, (_, rivals, _) in ranked.items() for arm, pairs in rivals]
    known = [(where, arm, p) for where, arm, p in tested if p is not None]
    corrected = {(where, arm): p for (where, arm, _), p in zip(known, holm([p for *_, p in known]), strict=True)}
    return {
        where: Verdict(
            where,
            measure.key,
            first,
            tuple(Rival(arm, pairs, corrected.get((where, arm))) for arm, pairs in rivals),
            left_out,
        )
        for where, (first, rivals, left_out) in ranked.items()
    }


def differences(values: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Return value minus other for each draw that both have, in the order of the draws."""
    return [values[draw] - others[draw] for draw in sorted(values.keys() & others.keys())]


def _order(
    arms: Mapping[str, Mapping[int, float]], measure: Measure, reference: str
) -> tuple[list[str], tuple[str, ...]]:
    """Return the contenders, best first, and those with too few draws."""
    contenders = [arm for arm in arms if arm not in OUT_OF_REACH]
    if not contenders:
        return [], ()
    most = max(len(arms[arm]) for arm in contenders)
    # All are compared by one arm that has every draw, so that missing draws favour nobody.
    yardstick = reference if len(arms.get(reference, ())) == most else _first_with(most, contenders, arms)
    sign = 1 if measure.lower_is_better else -1
    ranked, left_out = [], []
    for arm in contenders:
        pairs = differences(arms[arm], arms[yardstick])
        if len(pairs) < min(2, most) or any(not arms[arm].keys() & arms[other].keys() for other, *_ in ranked):
            left_out.append(arm)
        else:
            ranked.append((arm, sign * sum(pairs) / len(pairs)))
    return [arm for arm, _ in sorted(ranked, key=lambda pair: pair[1])], tuple(left_out)


def _first_with(most: int, contenders: Sequence[str], arms: Mapping[str, Mapping[int, float]]) -> str:
    return next(arm for arm in contenders if len(arms[arm]) == most)
