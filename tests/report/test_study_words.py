"""Sentences say who is first only where that can be told."""

from typing import Any

import pytest

from flexlora.report.pair_statistics import pair_statistics
from flexlora.report.paired import summary
from flexlora.report.study_tables import main_rows
from flexlora.report.study_words import draws_text, headline, interval_text, listed, p_text, verdict_sentence

MakeRow = Any
GAPS = {"fedit_smallest": 0.0, "aligned": -0.05, "flexlora": 0.02, "fedit_largest": -0.2}


def test_a_winner_everywhere_takes_one_sentence(study_row: MakeRow) -> None:
    rows = study_row.study(GAPS) + study_row.study(GAPS, seed=3, distribution="skewed")
    said = headline(summary(rows))
    assert said.startswith("aligned has the lowest loss on unseen tasks on all 2 distributions: 0.0")
    assert said.endswith("below fedit_smallest, the next.")


def test_a_tie_is_said_with_the_draws_that_it_takes(study_row: MakeRow) -> None:
    found = summary(study_row.study({**GAPS, "aligned": 0.0}, noise=0.02))
    said = headline(found)
    assert said.startswith("no arm is first: ") or said.startswith("No arm is first: ")
    assert "is tied with" in said and "would take" in said and "not 8 draws" in said


def test_a_mixed_outcome_names_the_distributions(study_row: MakeRow) -> None:
    rows = study_row.study(GAPS) + study_row.study({**GAPS, "aligned": 0.0}, noise=0.02, distribution="skewed")
    said = headline(summary(rows))
    assert "aligned has the lowest loss on unseen tasks on uniform: " in said
    assert "On skewed, no arm is first: " in said


def test_a_winner_is_told_with_the_arms_that_scatter(study_row: MakeRow) -> None:
    rows = study_row.study(GAPS)
    rows += [study_row("wild", draw, 1.72 + (1.0 if draw == 0 else 0.0)) for draw in range(8)]
    found = summary(rows)
    said = verdict_sentence(found.verdicts["unseen_loss", "uniform"], found.measures[0])
    assert found.verdicts["unseen_loss", "uniform"].winner == "aligned"
    assert said.endswith("wild cannot be told from it: the runs scatter too much.")


@pytest.mark.parametrize("stage", ["nothing", "alone", "one draw", "equal"])
def test_there_is_a_sentence_at_every_stage(study_row: MakeRow, stage: str) -> None:
    rows, said = {
        "nothing": ([], "No test run has ended yet."),
        "alone": ([study_row("aligned")], "There is no second arm to compare with yet."),
        "one draw": ([study_row("aligned"), study_row("flexlora", loss=1.8)], "takes at least two draws"),
        "equal": ([study_row(arm, d) for arm in ("a", "b") for d in range(4)], "b is equal to it in every draw"),
    }[stage]
    assert said in headline(summary(rows))


def test_short_texts_never_say_zero_or_nan() -> None:
    assert p_text(1e-9) == "< 0.001" and p_text(None) == "–" and p_text(0.0432) == "0.043"
    assert interval_text(pair_statistics([0.1]), 3) == "–"
    assert draws_text(pair_statistics([0.1])) == "–"
    assert draws_text(pair_statistics([1.0, -1.0, 1e-6])) == "> 100\u202f000"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(list("abcdefgh"), 4) == "a, b, c and 5 others"


def test_the_main_table_marks_places_and_effects(study_row: MakeRow) -> None:
    found = summary(study_row.study({**GAPS, "near": 0.001}))
    rows = {row.cell.arm: row for row in main_rows(found, found.measures[0], "uniform")}
    places = {arm: row.place for arm, row in rows.items()}
    assert list(rows)[:2] == ["fedit_largest", "aligned"]
    assert places["fedit_largest"] == "bound" and places["aligned"] == "first" and places["near"] == "behind"
    assert {arm: row.effect for arm, row in rows.items() if arm != "flexlora"} == {
        "fedit_largest": "better",
        "aligned": "better",
        "near": "open",
        "fedit_smallest": None,
    }


def test_one_draw_ranks_nobody(study_row: MakeRow) -> None:
    rows = study_row.study({"fedit_smallest": 0.0, "aligned": -0.5, "base": 4.0}, draws=1)
    found = summary(rows)
    assert headline(found) == (
        "It takes at least two draws to rank arms. In the one there is, aligned has the lowest loss on unseen tasks."
    )
    assert {row.place for row in main_rows(found, found.measures[0], "uniform")} == {"early"}
    both = summary([*rows, *({**row, "distribution": "normal"} for row in rows)])
    assert headline(both) == "It takes at least two draws to rank arms; so far, there is one on uniform and normal."
