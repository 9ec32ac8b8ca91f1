"""Numbers in tables, against values worked out here in another way."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flexlora import text
from flexlora.report import tables
from flexlora.rounds.records import (
    ManifestRecord,
    ReferencesRecord,
    RoundRecord,
    SpectrumRecord,
    read_manifest,
    read_references,
)


@pytest.fixture
def references(whole_run: Path) -> ReferencesRecord:
    return read_references(whole_run / "references.json")


@pytest.fixture
def manifest(whole_run: Path) -> ManifestRecord:
    found = read_manifest(whole_run / "manifest.json")
    assert found
    return found


def test_summary_has_base_local_fedit_and_federated_with_differences_to_base(
    records: list[RoundRecord], references: ReferencesRecord
) -> None:
    rows = tables.summary_table(records, references, "flexlora")
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
    assert federated.up_bytes == sum(client.up_bytes for record in records for client in record.clients)


def test_summary_counts_the_bytes_up_to_the_round_it_shows(records: list[RoundRecord]) -> None:
    # Round 4 was trained but not evaluated, so the row is that of round 3.
    row = tables.summary_table(records[:5], ReferencesRecord())[-1]
    assert row.detail == "after round 3"
    assert row.down_bytes == sum(record.down_bytes for record in records[1:4])


def test_summary_cells_match_the_columns(records: list[RoundRecord], references: ReferencesRecord) -> None:
    cells = [tables.summary_cells(row) for row in tables.summary_table(records, references)]
    assert {len(row) for row in cells} == {len(tables.SUMMARY_COLUMNS)}
    assert cells[0] == ["Base model, before any training", "12.0", "10.5", "5.6 %", "2.720", "–", "0 B", "0 B"]


def test_before_the_first_round_there_is_only_the_base(records: list[RoundRecord]) -> None:
    rows = tables.summary_table(records[:1], ReferencesRecord())
    assert [(row.name, row.rouge_l) for row in rows] == [("Base model", 12.0)]
    assert tables.summary_table([], ReferencesRecord()) == []


def test_a_score_that_is_not_a_number_is_shown_as_missing(broken_numbers: RoundRecord) -> None:
    (row,) = tables.summary_table([broken_numbers], ReferencesRecord())
    assert (row.rouge_l, row.loss, row.difference) == (None, None, None)
    assert tables.category_table([broken_numbers], ReferencesRecord())[0].federated is None


def test_categories_are_compared_with_base_and_fedit_and_sorted_by_gain(
    records: list[RoundRecord], references: ReferencesRecord
) -> None:
    rows = tables.category_table(records, references)
    assert [row.name for row in rows] == ["Word Analogy", "Text to Code", "Question Answering", "Sentiment Analysis"]
    final = 12 + 30 * (1 - 0.75**12)
    assert rows[0].base == pytest.approx(12 * 1.3)
    assert rows[0].federated == pytest.approx(final * 1.3)
    assert rows[0].difference == pytest.approx((final - 12) * 1.3)
    assert rows[0].fedit == pytest.approx(32.9 * 1.3)
    assert (rows[0].num_tasks, rows[0].num_examples) == (2, 40)
    weighted, unweighted = tables.total_rows(records, references)
    assert (weighted.base, unweighted.base) == (12.0, 10.5)


def test_plans_add_up_to_the_rounds(records: list[RoundRecord], manifest: ManifestRecord) -> None:
    rows = {row.plan: row for row in tables.plan_table(records, manifest)}
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
    rows = tables.plan_table(records, None)
    assert [row.plan for row in rows] == ["type1", "type2", "type3", "type4"]
    assert rows[0].num_clients is None
    assert rows[0].num_never_sampled is None


def test_times_sampled_count_every_client_once(records: list[RoundRecord], manifest: ManifestRecord) -> None:
    histograms = tables.times_sampled(records, manifest)
    assert {plan: histogram.total() for plan, histogram in histograms.items()} == manifest.plan_counts
    turns = Counter(c.client_id for record in records for c in record.clients if c.plan == "type2")
    assert +histograms["type2"] == Counter({**Counter(turns.values()), 0: 10 - len(turns)})
    assert tables.times_sampled(records, None)["type2"][0] == 0


def test_fairness_weights_by_examples_and_compares_the_same_clients(
    records: list[RoundRecord], references: ReferencesRecord, manifest: ManifestRecord
) -> None:
    row = tables.fairness_table(records, references, manifest)[1]
    # Two clients of type2, with 10 and 30 test examples and scores 35 and 36.
    assert row.federated == pytest.approx((10 * 35 + 30 * 36) / 40)
    assert (row.plan, row.num_clients, row.base, row.local_only) == ("type2", 2, 11.0, 31.0)
    assert row.gain_over_base == pytest.approx(24.75)
    assert row.gain_over_local == pytest.approx(4.75)
    assert row.unseen == pytest.approx(12 + 30 * (1 - 0.75**12) - 3)


def test_fairness_falls_back_to_the_rank_groups(records: list[RoundRecord], manifest: ManifestRecord) -> None:
    row = tables.fairness_table(records, ReferencesRecord(), manifest)[0]
    final = 12 + 30 * (1 - 0.75**12)
    assert (row.num_clients, row.local_only, row.gain_over_local) == (3, None, None)
    assert row.federated == pytest.approx(final + 1)
    assert row.base == pytest.approx(13.0)
    assert tables.fairness_table([], ReferencesRecord(), manifest) == []


def test_time_by_stage_leaves_the_total_out_and_shares_add_up(records: list[RoundRecord]) -> None:
    rows = tables.time_table(records)
    assert [row.stage for row in rows] == ["broadcast", "train", "aggregate", "evaluate", "checkpoint"]
    train = next(row for row in rows if row.stage == "train")
    assert train.seconds == pytest.approx(12 * 7.5 + 0.3 * 78)
    assert train.seconds_each == pytest.approx(train.seconds / 12)
    assert sum(row.share for row in rows) == pytest.approx(1)


def test_failures_name_round_client_stage_and_reason(records: list[RoundRecord]) -> None:
    rows = tables.failure_table(records)
    assert [(row.server_round, row.stage) for row in rows] == [(3, "validate"), (7, "validate")]
    assert "NaN" in rows[0].reason


@pytest.mark.parametrize("rank", [0, 1, 3, 6, 9])
def test_truncation_error_is_the_distance_to_the_best_approximation(rank: int) -> None:
    matrix = np.random.default_rng(0).normal(size=(9, 6))
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    approximation = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    expected = np.linalg.norm(matrix - approximation) / np.linalg.norm(matrix)
    cut = SpectrumRecord(singular_values=S[:4].tolist(), tail=float(np.linalg.norm(S[4:])))
    whole = SpectrumRecord(singular_values=S.tolist())
    assert tables.truncation_error(whole, rank) == pytest.approx(expected, abs=1e-12)
    if rank <= 4:
        assert tables.truncation_error(cut, rank) == pytest.approx(expected, abs=1e-12)


def test_a_change_that_is_zero_or_broken_has_no_truncation_error(broken_numbers: RoundRecord) -> None:
    assert tables.truncation_error(SpectrumRecord(singular_values=[0.0, 0.0]), 1) is None
    assert tables.truncation_error(broken_numbers.spectra["a.q_proj"], 1) is None


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({"a.q_proj": 8, "b.q_proj": 8}, "8 in every module"),
        (
            {"l.0.q_proj": 30, "l.0.k_proj": 30, "l.0.up_proj": 200, "l.1.q_proj": 30},
            "30 (q, k), 200 (up)",
        ),
        ({"l.0.q_proj": 4, "l.1.q_proj": 8, "l.0.v_proj": 4}, "4 (v), 4–8 (q)"),
        ({}, "no modules"),
    ],
)
def test_ranks_are_described_in_few_words(ranks: dict[str, int], words: str) -> None:
    assert text.describe_ranks(ranks) == words


def test_short_names_stay_different_and_layers_count_upwards() -> None:
    modules = [f"model.layers.{layer}.{leaf}" for layer in (10, 2) for leaf in ("mlp.up_proj", "self_attn.q_proj")]
    ordered = sorted(modules, key=text.layer_order)
    assert text.short_names(ordered) == ["2.q", "2.up", "10.q", "10.up"]
    assert text.short_names(["model.lm_head"]) == ["lm_head"]
    assert text.short_names(["mlp.a", "self_attn.a"]) == ["mlp", "self_attn"]
    assert text.short_names(["a", "a.b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (text.number_text(1234567.0, 0), "1\u202f234\u202f567"),
        (text.number_text(-1.25, 2), "\u22121.25"),
        (text.number_text(math.nan), "–"),
        (text.number_text(None), "–"),
        (text.signed_text(3.04), "+3.0"),
        (text.signed_text(-0.04), "0.0"),
        (text.signed_text(-12.5), "\u221212.5"),
        (text.percent_text(0.1234), "12.3 %"),
        (text.bytes_text(0), "0 B"),
        (text.bytes_text(999), "999 B"),
        (text.bytes_text(1000), "1.0 kB"),
        (text.bytes_text(999_600), "1.0 MB"),
        (text.bytes_text(123_456_789), "123 MB"),
        (text.bytes_text(5.38e9), "5.4 GB"),
        (text.bytes_text(2.5e15), "2\u202f500.0 TB"),
        (text.bytes_text(None), "–"),
        (text.seconds_text(0.0304), "30 ms"),
        (text.seconds_text(59.94), "59.9 s"),
        (text.seconds_text(59.96), "1 min 00 s"),
        (text.seconds_text(3599.6), "1 h 00 min"),
        (text.seconds_text(7384), "2 h 03 min"),
        (text.seconds_text(None), "–"),
        (text.count_text(1, "client"), "1 client"),
        (text.count_text(1613, "client"), "1\u202f613 clients"),
    ],
)
def test_numbers_are_written_with_their_units(text: str, expected: str) -> None:
    assert text == expected
