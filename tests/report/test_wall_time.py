"""Seconds by stage, summed here in another way."""

import pytest

from flexlora.report.wall_time import time_table
from flexlora.rounds.records import RoundRecord


def test_time_by_stage_leaves_the_total_out_and_shares_add_up(records: list[RoundRecord]) -> None:
    rows = time_table(records)
    assert [row.stage for row in rows] == ["broadcast", "train", "aggregate", "evaluate", "checkpoint"]
    train = next(row for row in rows if row.stage == "train")
    assert train.seconds == pytest.approx(12 * 7.5 + 0.3 * 78)
    assert train.seconds_each == pytest.approx(train.seconds / 12)
    assert sum(row.share for row in rows) == pytest.approx(1)
