"""Who took part and what they moved, counted here in another way."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from flexlora.report.participation import device_table, failure_table, plan_table, times_sampled
from flexlora.rounds.records import ManifestRecord, RoundRecord, read_manifest


@pytest.fixture
def manifest(whole_run: Path) -> ManifestRecord:
    found = read_manifest(whole_run / "manifest.json")
    assert found
    return found


def test_plans_add_up_to_the_rounds(records: list[RoundRecord], manifest: ManifestRecord) -> None:
    rows = {row.plan: row for row in plan_table(records, manifest)}
    assert list(rows) == ["type1", "type2", "type3", "type4"]
    assert sum(row.up_bytes for row in rows.values()) == sum(record.up_bytes for record in records)
    assert sum(row.down_bytes for row in rows.values()) == sum(record.down_bytes for record in records)
    assert sum(row.num_ok for row in rows.values()) == sum(record.num_ok for record in records)
    assert sum(row.num_failed for row in rows.values()) == 2
    seen = {c.client_id for record in records for c in record.clients if c.plan == "type1"}
    assert rows["type1"].num_sampled == len(seen)
    assert rows["type1"].num_never_sampled == 60 - len(seen)
    # Rank 2 in 14 modules, 400 bytes per rank and module, 300 bytes of header on the way up.
    assert rows["type1"].up_bytes_each == 14 * 2 * 400 + 300
    assert rows["type1"].down_bytes_each == 14 * 2 * 400


def test_plans_are_known_from_the_clients_when_there_is_no_manifest(records: list[RoundRecord]) -> None:
    rows = plan_table(records, None)
    assert [row.plan for row in rows] == ["type1", "type2", "type3", "type4"]
    assert rows[0].num_clients is None
    assert rows[0].num_never_sampled is None


def test_times_sampled_count_every_client_once(records: list[RoundRecord], manifest: ManifestRecord) -> None:
    histograms = times_sampled(records, manifest)
    assert {plan: histogram.total() for plan, histogram in histograms.items()} == manifest.plan_counts
    turns = Counter(c.client_id for record in records for c in record.clients if c.plan == "type2")
    assert +histograms["type2"] == Counter({**Counter(turns.values()), 0: 10 - len(turns)})
    assert times_sampled(records, None)["type2"][0] == 0


def test_failures_name_round_client_stage_and_reason(records: list[RoundRecord]) -> None:
    rows = failure_table(records)
    assert [(row.server_round, row.stage) for row in rows] == [(3, "validate"), (7, "validate")]
    assert "NaN" in rows[0].reason


def test_devices_are_summed_up_quickest_first(
    rounds_of: Callable[..., list[RoundRecord]], manifest_of: Callable[..., ManifestRecord]
) -> None:
    rows = device_table(rounds_of({}, 1.0), manifest_of("async"))
    assert [(row.device, row.num_clients, row.num_sent, row.num_ok, row.num_failed) for row in rows] == [
        ("pc", 2, 4, 4, 0),
        ("tv", 2, 4, 0, 4),
        ("watch", 1, 0, 0, 0),
    ]
    assert (rows[0].seconds_each, rows[0].staleness_each, rows[0].up_bytes) == (2.0, 2.5, 40)
    assert rows[1].seconds_each is None and rows[1].down_bytes == 80
