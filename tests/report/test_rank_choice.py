"""Which rank to export: the smallest that is shown to be nearly as good, never one that merely was not told apart."""

from pathlib import Path

from flexlora.report.rank_choice import RankRow, choice_in_words, chosen_rank, rank_rows
from flexlora.report.run_folder import read_run
from flexlora.report.task_differences import Difference

WHOLE = RankRow(16, 40.0, None, 900, True)


def row(rank: int, low: float, high: float) -> RankRow:
    return RankRow(rank, 40.0, Difference((low + high) / 2, low, high, 20), 100)


def test_the_smallest_rank_whose_interval_stays_above_minus_one_is_chosen() -> None:
    rows = [row(1, -3.0, 0.5), row(4, -0.8, 0.2), row(8, -0.1, 0.1), WHOLE]
    chosen = chosen_rank(rows)
    assert chosen is not None and chosen.rank == 4
    assert choice_in_words(rows) == "The smallest shown to stay within 1 point of rank 16."


def test_a_wide_interval_does_not_make_a_small_rank_good_enough() -> None:
    rows = [row(1, -9.0, 8.0), RankRow(4, 40.0, None, 100), WHOLE]
    assert chosen_rank(rows) == WHOLE
    assert choice_in_words(rows) == "No smaller rank is shown to stay within 1 point of it."
    assert choice_in_words([WHOLE]) == "The only rank of the run." and choice_in_words([]) == "Not measured."


def test_ranks_are_those_of_devices_with_one_rank_and_their_sizes_those_on_disk(whole_run: Path) -> None:
    (whole_run / "adapters" / "rank-2").mkdir()
    (whole_run / "adapters" / "rank-2" / "adapter_model.safetensors").write_bytes(b"x" * 123)
    rows = rank_rows(read_run(whole_run))
    # type3 has two ranks, which no export by rank gives.
    assert [(one.rank, one.num_bytes, one.is_whole) for one in rows] == [
        (2, 123, False),
        (6, None, False),
        (16, 0, True),
    ]
    assert rows[0].difference is not None and rows[0].difference.high < 0
