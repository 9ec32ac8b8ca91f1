"""Tables and figures behind the main table, against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest

from flexlora.report.paired import summary
from flexlora.report.study_details import category_tables, cost_rows, measure_rows, rates_table
from flexlora.report.study_figures import curves, draws_words, forests, line_arms, rate_figures

MakeRow = Any


def test_costs_are_ordered_by_bytes_and_compared_with_the_reference(study_row: MakeRow) -> None:
    rows = [
        study_row("fedit_smallest"),
        study_row("flora", up_bytes=9000, down_bytes=3000),
        study_row("ffa", up_bytes=0),
    ]
    found = [(row.arm, row.bytes_ratio) for row in cost_rows(summary(rows), "uniform")]
    # 3000 bytes are the reference's.
    assert found == [("ffa", pytest.approx(2 / 3)), ("fedit_smallest", 1.0), ("flora", 4.0)]


def test_a_reference_that_sends_nothing_gives_no_ratio(study_row: MakeRow) -> None:
    rows = [study_row("base", up_bytes=0, down_bytes=0), study_row("flora")]
    assert {row.bytes_ratio for row in cost_rows(summary(rows, "base"), "uniform")} == {None}


def test_categories_are_means_over_draws_with_the_best_marked(study_row: MakeRow) -> None:
    def categories(loss: float) -> dict[str, Any]:
        return {"B": {"loss": loss}, "A": {"loss": 2 * loss}}

    rows = [study_row("x", draw, 1.7, categories=categories(1.0 + draw)) for draw in range(2)]
    rows += [
        study_row("y", 0, 1.8, categories={"B": {"loss": 1.0}}),
        study_row("y", 1, None, categories=categories(0.1)),
    ]
    (table,) = category_tables(summary(rows, "x"))
    assert table.categories == ("A", "B")
    assert table.rows == (("x", (3.0, 1.5)), ("y", (None, 1.0)))
    assert table.best == (3.0, 1.0)


def test_rates_that_an_arm_did_not_try_are_left_open(study_row: MakeRow) -> None:
    rows = [study_row.tuning("a", 0.1, 1.7), study_row.tuning("a", 0.2, 1.8), study_row.tuning("b", 0.2, 1.5)]
    rates, table = rates_table(summary(rows), "uniform")
    assert rates == [0.1, 0.2]
    assert [(row.arm, [one and one.mean_loss for one in row.tried]) for row in table] == [
        ("a", [1.7, 1.8]),
        ("b", [None, 1.5]),
    ]


def test_every_measure_has_its_column(study_row: MakeRow) -> None:
    found = summary([study_row("a", own_loss=1.2), study_row("b")], "a")
    keys = [measure.key for measure in found.measures]
    assert keys[0] == "unseen_loss" and keys[-1] == "own_loss" and len(keys) == 9
    first, second = measure_rows(found, "uniform")
    assert first.cells[-1] is not None and second.cells[-1] is None


def test_charts_show_the_best_contenders_the_papers_method_and_the_bound(study_row: MakeRow) -> None:
    gaps = {f"m{n}": n / 10 for n in range(8)} | {"fedit_smallest": 0.0, "base": 1.0, "flexlora": 0.9}
    groups = line_arms(summary(study_row.study({**gaps, "fedit_largest": -0.5, "centralised": -0.6}, noise=0.0)))
    assert groups[0] == ["m0", "m1", "m2", "flexlora", "fedit_largest"]
    assert sorted(arm for group in groups for arm in group) == sorted(
        [*(f"m{n}" for n in range(8)), "flexlora", "fedit_largest", "centralised"]
    )


def test_curves_are_medians_and_differences_are_paired(study_row: MakeRow) -> None:
    rows = study_row.study({"fedit_smallest": 0.0, "a": 0.25}, noise=0.0)
    rows[-1] = study_row("a", 7, None)
    ((where, figures),) = curves(summary(rows), ["a"], "curve")
    assert where == "uniform"
    unseen, validation, paired = (figure.chart for figure in figures)
    assert unseen is not None and validation is not None and paired is not None
    # A run that diverged has no part in the median.
    losses = [row["unseen"]["loss"] for row in rows if row["arm"] == "a" and row["unseen"]["loss"] is not None]
    shown = {entry.name: entry.value for entry in unseen.legend}
    assert shown["a"] == f"{np.median(losses):.3f}"
    assert {entry.name: entry.value for entry in paired.legend} == {"a": "+0.2500", "fedit_smallest": "0.0000"}


def test_the_chosen_rate_and_its_edge_are_named_beside_the_line(study_row: MakeRow) -> None:
    rows = [study_row.tuning("a", rate, loss) for rate, loss in ((0.01, 1.9), (0.02, 1.6), (0.04, None))]
    rows += [study_row.tuning("b", rate, loss) for rate, loss in ((0.01, 1.9), (0.02, 1.6))]
    (figure,) = rate_figures(summary(rows), ["a", "b"])
    assert figure.chart is not None
    assert [(entry.name, entry.value) for entry in figure.chart.legend] == [
        ("a at 0.02", "1.600"),
        ("b at 0.02, highest tried", "1.600"),
    ]
    assert figure.chart.svg.count('class="ring') == 2


def test_forests_leave_the_reference_out(study_row: MakeRow) -> None:
    found = summary(study_row.study({"fedit_smallest": 0.0, "aligned": -0.05, "base": 0.5}))
    (figure,) = forests(found, found.measures[0])
    assert figure.chart is not None
    assert "aligned" in figure.chart.description and "fedit_smallest" not in figure.chart.description
    assert draws_words(found) == "8 test draws, 0 tuning draws"
