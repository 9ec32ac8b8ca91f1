"""Numbers in tables of scores, against values worked out here in another way."""

from pathlib import Path

import pytest

from flexlora.report.score_tables import (
    SUMMARY_COLUMNS,
    summary_cells,
    summary_table,
)
from flexlora.rounds.records import ReferencesRecord, RoundRecord, read_references


@pytest.fixture
def references(whole_run: Path) -> ReferencesRecord:
    return read_references(whole_run / "references.json")


def test_summary_has_base_local_fedit_and_federated_with_differences_to_base(
    records: list[RoundRecord], references: ReferencesRecord
) -> None:
    rows = summary_table(records, references, "flexlora")
    assert [row.name for row in rows] == [
        "Base model",
        "Training alone",
        "FedIT at the smallest rank",
        "Federated (flexlora)",
    ]
    base, local, fedit, federated = rows
    final = 12 + 30 * (1 - 0.75**12)
    assert federated.rouge_l == pytest.approx(final)
    assert federated.rouge_l_unweighted == pytest.approx(final - 1.5)
    assert federated.difference == pytest.approx(final - 12)
    assert (base.difference, local.difference) == (None, pytest.approx(5.5))
    assert (fedit.difference, fedit.up_bytes) == (pytest.approx(20.9), 4_000_000)
    assert local.rouge_l_unweighted is None
    # Eight clients trained alone: too few for an interval.
    assert (base.interval, local.interval) == (None, None)
    assert federated.interval and federated.interval.low > 0 and federated.interval.num_units == 8
    assert federated.up_bytes == sum(client.up_bytes for record in records for client in record.clients)


def test_summary_has_the_other_reference_runs_with_who_takes_part_and_their_learning_rates(
    records: list[RoundRecord], run_with_controls: Path
) -> None:
    rows = summary_table(records, read_references(run_with_controls / "references.json"))
    assert [(row.name, row.detail, row.rouge_l, row.up_bytes) for row in rows[3:5]] == [
        ("Large clients alone", "FedIT among 24 clients, 16 in every module", 30.0, 2_000_000),
        ("FedIT at the largest rank", "16 in every module, learning rate 0.01", 45.5, 64_000_000),
    ]
    assert [row.difference for row in rows[3:5]] == [pytest.approx(18.0), pytest.approx(33.5)]
    assert (rows[2].name, rows[5].name) == ("FedIT at the smallest rank", "Federated")


def test_summary_counts_the_bytes_up_to_the_round_it_shows(records: list[RoundRecord]) -> None:
    # Round 4 was trained but not evaluated, so the row is that of round 3.
    row = summary_table(records[:5], ReferencesRecord())[-1]
    assert row.detail == "after round 3"
    assert row.down_bytes == sum(record.down_bytes for record in records[1:4])


def test_summary_cells_match_the_columns(records: list[RoundRecord], references: ReferencesRecord) -> None:
    cells = [summary_cells(row) for row in summary_table(records, references)]
    assert {len(row) for row in cells} == {len(SUMMARY_COLUMNS)}
    assert cells[0] == ["Base model, before any training", "12.0", "10.5", "5.6 %", "2.720", "–", "0 B", "0 B"]


def test_before_the_first_round_there_is_only_the_base(records: list[RoundRecord]) -> None:
    rows = summary_table(records[:1], ReferencesRecord())
    assert [(row.name, row.rouge_l) for row in rows] == [("Base model", 12.0)]
    assert summary_table([], ReferencesRecord()) == []


def test_a_score_that_is_not_a_number_is_shown_as_missing(broken_numbers: RoundRecord) -> None:
    (row,) = summary_table([broken_numbers], ReferencesRecord())
    assert (row.rouge_l, row.loss, row.difference) == (None, None, None)
