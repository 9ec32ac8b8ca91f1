"""Scores by category and by device: gains only where there are enough tasks or clients, and with an interval."""

from pathlib import Path

import numpy as np
import pytest

from flexlora.report.group_tables import category_table, fairness_table, total_rows
from flexlora.rounds.records import (
    ManifestRecord,
    ReferencesRecord,
    RoundRecord,
    TaskScoreRecord,
    read_manifest,
    read_references,
)

FINAL = 12 + 30 * (1 - 0.75**12)


@pytest.fixture
def references(whole_run: Path) -> ReferencesRecord:
    return read_references(whole_run / "references.json")


@pytest.fixture
def manifest(whole_run: Path) -> ManifestRecord:
    found = read_manifest(whole_run / "manifest.json")
    assert found
    return found


def test_a_category_of_few_tasks_has_scores_and_no_gain(
    records: list[RoundRecord], references: ReferencesRecord
) -> None:
    rows = category_table(records, references)
    assert [row.name for row in rows] == ["Word Analogy", "Text to Code", "Question Answering", "Sentiment Analysis"]
    assert rows[0].base == pytest.approx(12 * 1.3)
    assert rows[0].federated == pytest.approx(FINAL * 1.3)
    assert rows[0].fedit == pytest.approx(32.9 * 1.3)
    assert (rows[0].num_tasks, rows[0].num_examples) == (2, 40)
    assert [row.difference for row in rows] == [None] * 4


def test_a_category_of_eight_tasks_has_a_gain_with_its_interval(
    records: list[RoundRecord], references: ReferencesRecord
) -> None:
    def of_eight(rouge_l: float) -> dict[str, object]:
        tasks = {
            f"{number}": TaskScoreRecord(rouge_l=rouge_l + number, num_examples=5, category="Text to Code")
            for number in range(8)
        }
        return {"tasks": tasks}

    last, base = records[-1].evaluation, references.base
    assert last and base
    category = last.categories["Text to Code"].model_copy(update={"num_tasks": 8})
    last = last.model_copy(update={**of_eight(20.0), "categories": {"Text to Code": category}})
    records = [*records[:-1], records[-1].model_copy(update={"evaluation": last})]
    references = references.model_copy(update={"base": base.model_copy(update=of_eight(15.0))})
    row = next(row for row in category_table(records, references) if row.name == "Text to Code")
    # All tasks gain 5, so does every resample.
    assert row.interval and (row.interval.low, row.interval.high) == (pytest.approx(5), pytest.approx(5))
    assert row.difference == pytest.approx((FINAL - 12) * 1.1)


def test_totals_have_the_gain_over_all_tasks(records: list[RoundRecord], references: ReferencesRecord) -> None:
    weighted, unweighted = total_rows(records, references)
    assert (weighted.base, unweighted.base) == (12.0, 10.5)
    assert weighted.difference == pytest.approx(FINAL - 12)
    assert weighted.interval and weighted.interval.low > 0


def test_each_device_has_its_gain_over_thirty_clients(
    records: list[RoundRecord], references: ReferencesRecord, manifest: ManifestRecord
) -> None:
    rows = fairness_table(records, references, manifest)
    assert [(row.plan, row.num_clients) for row in rows] == [("type1", 30), ("type2", 31), ("type3", 32), ("type4", 33)]
    number = np.arange(31)
    weights = 1 + number % 2
    gains = (FINAL + 2 + number % 5 - 2) - (14 + number % 3 - 1)
    assert rows[1].over_base and rows[1].over_base.value == pytest.approx(np.average(gains, weights=weights))
    # Two clients of each type trained alone: no claim.
    assert [(row.local_only, row.over_local) for row in rows] == [(None, None)] * 4


def test_one_client_fewer_than_thirty_makes_no_claim(records: list[RoundRecord], manifest: ManifestRecord) -> None:
    last = records[-1].evaluation
    assert last
    group = last.rank_groups["type1"].model_copy(update={"num_clients": 29})
    last = last.model_copy(update={"rank_groups": {"type1": group}})
    records = [*records[:-1], records[-1].model_copy(update={"evaluation": last})]
    assert fairness_table(records, ReferencesRecord(), manifest) == []
    assert fairness_table([], ReferencesRecord(), manifest) == []


def test_thirty_clients_that_trained_alone_are_compared_with_themselves(
    records: list[RoundRecord], references: ReferencesRecord, manifest: ManifestRecord
) -> None:
    assert references.local_only
    one = references.local_only.clients[0]
    clients = [one.model_copy(update={"client_id": f"{number}"}) for number in range(30)]
    local = references.local_only.model_copy(update={"clients": clients})
    row = fairness_table(records, references.model_copy(update={"local_only": local}), manifest)[0]
    assert row.local_only == pytest.approx(30.0)
    assert row.over_local and row.over_local.value == pytest.approx(3.0)
