"""Says in sentences and short texts what a comparison shows."""

from collections.abc import Sequence

from flexlora.report.measures import Measure
from flexlora.report.pair_statistics import MAX_DRAWS, PairStatistics
from flexlora.report.paired import Cell, Summary
from flexlora.report.verdicts import Rival, Verdict
from flexlora.text import NONE, count_text, number_text, signed_text

CONTROLS = {
    "base": "base model, not trained",
    "fedit_smallest": "FedIT at the smallest rank",
    "fedit_largest": "FedIT at the largest rank, if all could afford it",
    "large_alone": "FedIT among those clients alone that afford the largest rank",
    "centralised": "one machine with the data of all, for as many steps",
    "alone": "a few clients of each type, each by itself",
}
"""Label of a control -> what it is."""

_EARLY = "It takes at least two draws to rank arms"


def p_text(p: float | None) -> str:
    """Return a p-value with three decimals, or that it is smaller."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else number_text(p, 3)


def p_words(p: float | None) -> str:
    """Return a p-value for a sentence: ``p = 0.012``, ``p < 0.001``."""
    return "p unknown" if p is None else f"p {'' if p < 0.001 else '= '}{p_text(p)}"


def interval_text(pairs: PairStatistics | None, digits: int) -> str:
    """Return the 95 % interval of a mean difference: ``−0.031 to −0.012``."""
    if pairs is None or pairs.low is None:
        return NONE
    return f"{signed_text(pairs.low, digits)} to {signed_text(pairs.high, digits)}"


def spread_text(cell: Cell, digits: int) -> str:
    """Return mean and standard deviation: ``1.702 ± 0.013``."""
    spread = f" ± {number_text(cell.sd, digits)}" if cell.sd is not None else ""
    return number_text(cell.mean, digits) + spread


def draws_text(pairs: PairStatistics | None) -> str:
    """Return the draws that a power of 80 % takes; a dash where that is not known."""
    if pairs is None or pairs.power is None:
        return NONE
    if pairs.draws_needed is None:
        return f"> {number_text(MAX_DRAWS, 0)}"
    return number_text(pairs.draws_needed, 0)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return names as a list in a sentence; of many, the first ones and a count."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def headline(summary: Summary) -> str:
    """Return who is first and where arms are tied, over all distributions, in one or a few sentences."""
    measure = summary.headline
    if measure is None:
        return "No test run has ended yet."
    keys = [(measure.key, where) for where in summary.distributions]
    found = [summary.verdicts[key] for key in keys if key in summary.verdicts]
    if not any(verdict.rivals or verdict.left_out for verdict in found):
        return "There is no second arm to compare with yet."
    won: dict[str, list[Verdict]] = {}
    for verdict in found:
        if verdict.winner:
            won.setdefault(verdict.winner, []).append(verdict)
    sentences = [_won(arm, verdicts, measure, len(found)) for arm, verdicts in won.items()]
    open_ones = [verdict for verdict in found if not verdict.winner]
    early = [verdict for verdict in open_ones if verdict.is_early]
    if len(early) == len(found) > 1:
        return f"{_EARLY}; so far, there is one on {listed([verdict.distribution for verdict in early])}."
    sentences += [verdict_sentence(verdict, measure, len(found) > 1) for verdict in open_ones]
    return " ".join(sentences)


def verdict_sentence(verdict: Verdict, measure: Measure, with_place: bool = True) -> str:
    """Return the verdict on one distribution, with numbers: who is first and by how much, or what it is tied with."""
    place = f"On {verdict.distribution}, " if with_place else ""
    rival = verdict.runner_up
    if rival is None:
        others = f"; {listed(verdict.left_out)} cannot: too few draws, or a failed run" if verdict.left_out else ""
        return _capital(f"{place}{verdict.first} is the only arm that can be ranked{others}.")
    if verdict.is_early:
        words = f"{_EARLY[0].lower()}{_EARLY[1:]}"
        return _capital(f"{place}{words}. In the one there is, {verdict.first} has {_what(measure)}.")
    draws = count_text(rival.pairs.num_pairs, "draw")
    if not verdict.winner:
        return _capital(
            f"{place}no arm is first: {verdict.first} has {_what(measure)}, but {_tie(verdict, measure)}, not {draws}."
        )
    others = [one.arm for one in verdict.untold]
    scatter = f" {_capital(listed(others))} cannot be told from it: the runs scatter too much." if others else ""
    return (
        f"{place}{verdict.first} has {_what(measure)}, {_behind([rival], measure)} {rival.arm}, the next "
        f"(95 % interval {interval_text(rival.pairs, measure.digits)}, {p_words(rival.p_holm)}, {draws}).{scatter}"
    )


def _won(arm: str, verdicts: Sequence[Verdict], measure: Measure, num_distributions: int) -> str:
    rivals = [verdict.rivals[0] for verdict in verdicts]
    where = f" on {listed([verdict.distribution for verdict in verdicts])}"
    if len(verdicts) == num_distributions:
        where = f" on all {num_distributions} distributions" if num_distributions > 1 else ""
    after = "the next arm there" if len({rival.arm for rival in rivals}) > 1 else rivals[0].arm + ", the next"
    return f"{arm} has {_what(measure)}{where}: {_behind(rivals, measure)} {after}."


def _tie(verdict: Verdict, measure: Measure) -> str:
    rival = verdict.rivals[0]
    tied = f"is tied with {listed(verdict.tied, 4)}"
    if rival.pairs.power is None:
        return f"{tied}; {rival.arm} is equal to it in every draw, and telling them apart takes other draws"
    difference = signed_text(rival.pairs.mean, measure.digits)
    return f"{tied}; telling {rival.arm} apart ({difference}) would take {draws_text(rival.pairs)} draws"


def _capital(sentence: str) -> str:
    # Labels of arms keep their case.
    return sentence[0].upper() + sentence[1:] if sentence.startswith(("on ", "no ", "it ")) else sentence


def _what(measure: Measure) -> str:
    title = measure.title[0].lower() + measure.title[1:] if not measure.title.startswith("ROUGE") else measure.title
    return f"the {'lowest' if measure.lower_is_better else 'highest'} {title}"


def _behind(rivals: Sequence[Rival], measure: Measure) -> str:
    sizes = [number_text(abs(rival.pairs.mean), measure.digits) for rival in sorted(rivals, key=_distance)]
    size = sizes[0] if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    return f"{size} {'below' if measure.lower_is_better else 'above'}"


def _distance(rival: Rival) -> float:
    return abs(rival.pairs.mean)
