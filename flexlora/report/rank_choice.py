"""Says which rank of the adapter to export: the smallest that is shown to be nearly as good as the whole."""

from collections.abc import Sequence
from dataclasses import dataclass

from flexlora.report.run_folder import RunFolder
from flexlora.report.scores import finite, last_evaluated
from flexlora.report.task_differences import Difference, task_difference
from flexlora.text import number_text

TOLERANCE = 1.0
"""Points of ROUGE-L that a smaller rank may cost."""


@dataclass(frozen=True)
class RankRow:
    """The adapter at one rank on the unseen tasks; ``difference`` is to the adapter at the server's rank."""

    rank: int
    rouge_l: float | None
    difference: Difference | None
    num_bytes: int | None
    is_whole: bool = False


def rank_rows(run: RunFolder) -> list[RankRow]:
    """Return one row per rank that was scored, smallest first, the server's rank last; none before the end of a run."""
    last = last_evaluated(run.records)
    if last is None or last.server_round == 0 or last.evaluation is None or not last.evaluation.rank_groups:
        return []
    whole = last.evaluation
    top = max((rank for ranks in run.plan_ranks.values() for rank in ranks.values()), default=0)
    rows = {}
    for group in whole.rank_groups.values():
        ranks = set(group.ranks.values())
        if len(ranks) == 1 and group.unseen and (rank := ranks.pop()) < top:
            difference = task_difference(group.tasks, whole.tasks)
            size = run.adapter_bytes.get(f"rank-{rank}")
            rows[rank] = RankRow(rank, finite(group.unseen.rouge_l), difference, size)
    size = run.adapter_bytes.get(f"rank-{top}")
    return [*(rows[rank] for rank in sorted(rows)), RankRow(top, finite(whole.unseen.rouge_l), None, size, True)]


def chosen_rank(rows: Sequence[RankRow]) -> RankRow | None:
    """Return the smallest rank whose interval lies above ``-TOLERANCE``, else the whole; None without rows."""
    fits = (row for row in rows if row.is_whole or (row.difference and row.difference.low > -TOLERANCE))
    return next(fits, None)


def choice_in_words(rows: Sequence[RankRow]) -> str:
    """Return why `chosen_rank` is the one, in a sentence."""
    chosen = chosen_rank(rows)
    within = f"within {number_text(TOLERANCE, 0)} point"
    if chosen is None:
        return "Not measured."
    if len(rows) == 1:
        return "The only rank of the run."
    if chosen.is_whole:
        return f"No smaller rank is shown to stay {within} of it."
    return f"The smallest shown to stay {within} of rank {rows[-1].rank}."
