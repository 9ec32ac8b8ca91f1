"""Measures of a run against numbers worked out by hand and numpy, and what a run that went wrong counts as."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flexlora.report.measures import MEASURES, area, scores, went_wrong

BY_KEY = {measure.key: measure for measure in MEASURES}
MakeRow = Callable[..., dict[str, Any]]


def test_the_area_is_that_of_trapezoids_over_uneven_rounds() -> None:
    rounds, values = [1, 2, 5, 11], [3.0, 2.0, 1.5, 1.25]
    expected = np.trapezoid(values, rounds) / 10
    assert area(list(zip(rounds, values, strict=True))) == pytest.approx(expected, rel=1e-12)
    assert area([(4, 2.5)]) == 2.5
    assert area([]) is None


def test_the_measures_of_a_run_are_those_of_its_curve(study_row: MakeRow) -> None:
    row = study_row("fedit", loss=1.7)
    # Evaluations after rounds 2, 4, 6, 8; the last quarter of 8 rounds holds round 8 alone.
    assert BY_KEY["unseen_loss"].value(row) == 1.7
    assert BY_KEY["unseen_last"].value(row) == pytest.approx(1.7)
    heights = [1.7 + 1 / r - 1 / 8 for r in (2, 4, 6, 8)]
    assert BY_KEY["unseen_area"].value(row) == pytest.approx(np.trapezoid(heights, [2, 4, 6, 8]) / 6)
    assert BY_KEY["validation_loss"].value(row) == pytest.approx(1.8)
    assert BY_KEY["rouge_l"].value(row) == pytest.approx(23.0)
    assert BY_KEY["own_loss"].value(row) is None


def test_an_untrained_model_has_one_value_for_all_measures_of_a_loss(study_row: MakeRow) -> None:
    row = study_row("base", loss=2.1)
    assert {BY_KEY[key].value(row) for key in ("unseen_loss", "unseen_area", "unseen_last")} == {2.1}


@pytest.mark.parametrize(
    "changed",
    [
        {"diverged": True},
        {"failure": "out of memory"},
        {"validation_loss": math.nan},
        {"own_loss": math.inf},
        {"unseen": {"loss": None}},
        {"unseen": None, "validation_loss": None},
    ],
)
def test_a_run_that_diverged_or_failed_is_known_by_any_sign(study_row: MakeRow, changed: dict[str, Any]) -> None:
    assert went_wrong(study_row("fedit", **changed))


@pytest.mark.parametrize("changed", [{}, {"unseen": None}, {"validation_loss": None}, {"own_loss": 1.0}])
def test_what_was_not_measured_is_no_sign_of_divergence(study_row: MakeRow, changed: dict[str, Any]) -> None:
    assert not went_wrong(study_row("fedit", **changed))


def test_a_diverged_run_counts_as_the_worst_of_its_draw(study_row: MakeRow) -> None:
    rows = [
        study_row("base", 0, 2.1),
        study_row("fedit", 0, 1.7),
        study_row("base", 1, 2.2),
        study_row("fedit", 1, 2.3),
        study_row("wild", 0, None),
        study_row("wild", 1, 9.9, diverged=True),
        # Another distribution is another world.
        study_row("base", 0, 8.0, distribution="skewed"),
    ]
    found = scores(rows, BY_KEY["unseen_loss"])
    assert found["uniform", "wild"] == {0: 2.1, 1: 2.3}
    rouge = scores(rows, BY_KEY["rouge_l"])
    assert rouge["uniform", "wild"] == pytest.approx({0: 40 - 21, 1: 40 - 23})


def test_a_draw_on_which_all_diverged_counts_as_the_worst_of_the_distribution(study_row: MakeRow) -> None:
    rows = [study_row("wild", 0, None), study_row("tame", 1, 1.8), study_row("base", 1, 2.4)]
    assert scores(rows, BY_KEY["unseen_loss"])["uniform", "wild"] == {0: 2.4}
    assert scores(rows[:1], BY_KEY["unseen_loss"]) == {}


def test_where_no_base_model_ran_a_wrong_run_counts_as_what_the_curves_start_from(study_row: MakeRow) -> None:
    start = {"round": 0, "unseen_loss": 4.5, "validation_loss": 5.5}
    good = study_row("aligned", loss=1.7)
    good["curve"] = [start, *good["curve"]]
    rows = [good, study_row("wild", loss=None)]
    assert scores(rows, BY_KEY["unseen_loss"])["uniform", "wild"] == {0: 4.5}
    assert scores(rows, BY_KEY["validation_last"])["uniform", "wild"] == {0: 5.5}
    assert scores(rows, BY_KEY["unseen_loss"])["uniform", "aligned"] == {0: 1.7}


def test_clients_that_train_alone_validate_on_other_data_and_are_not_compared_by_it(study_row: MakeRow) -> None:
    rows = [study_row("aligned"), study_row("alone", loss=1.0)]
    assert ("uniform", "alone") not in scores(rows, BY_KEY["validation_loss"])
    assert scores(rows, BY_KEY["unseen_loss"])["uniform", "alone"] == {0: 1.0}
