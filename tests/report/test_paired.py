"""The summary of a comparison: every number against numpy and scipy, and sense at every stage of a study."""

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flexlora.report.paired import summary
from flexlora.report.study_words import headline
from flexlora.report.verdicts import OUT_OF_REACH

MakeRow = Any


def losses(rows: list[Any], arm: str, where: str = "uniform") -> np.ndarray:
    found = {r["draw"]: r["unseen"]["loss"] for r in rows if (r["arm"], r["distribution"]) == (arm, where)}
    return np.array([found[draw] for draw in sorted(found)])


GAPS = {"fedit_smallest": 0.0, "aligned": -0.05, "flexlora": 0.02, "base": 0.5, "fedit_largest": -0.2}


def test_means_and_paired_differences_are_those_of_scipy(study_row: MakeRow) -> None:
    rows = study_row.study(GAPS)
    found = summary(rows)
    cell = found.cells["unseen_loss", "uniform", "aligned"]
    ours, reference = losses(rows, "aligned"), losses(rows, "fedit_smallest")
    test = stats.ttest_rel(ours, reference)
    assert cell.mean == pytest.approx(np.mean(ours))
    assert cell.sd == pytest.approx(np.std(ours, ddof=1))
    assert cell.pairs is not None
    assert cell.pairs.mean == pytest.approx(np.mean(ours - reference))
    assert cell.pairs.low == pytest.approx(test.confidence_interval().low)
    assert cell.pairs.p == pytest.approx(test.pvalue)
    assert found.cells["unseen_loss", "uniform", "fedit_smallest"].pairs is None
    assert found.headline is not None and found.headline.key == "unseen_loss"


def test_holm_runs_over_all_arms_and_distributions_of_a_measure(study_row: MakeRow) -> None:
    rows = study_row.study(GAPS) + study_row.study(GAPS, noise=0.1, distribution="skewed")
    found = summary(rows)
    cells = [cell for cell in found.cells.values() if cell.measure == "unseen_loss" and cell.pairs]
    p_values = [
        stats.ttest_rel(losses(rows, c.arm, c.distribution), losses(rows, "fedit_smallest", c.distribution)).pvalue
        for c in cells
    ]
    assert len(p_values) == 8
    for cell, p in zip(cells, p_values, strict=True):
        # The definition: the largest of the scaled values up to its place.
        below = sorted(other for other in p_values if other <= p)
        expected = max(min(1.0, (8 - place) * other) for place, other in enumerate(below))
        assert cell.p_holm == pytest.approx(expected)


def test_any_arm_can_be_the_reference(study_row: MakeRow) -> None:
    rows = study_row.study(GAPS)
    one = summary(rows).cells["unseen_loss", "uniform", "flexlora"].pairs
    other = summary(rows, "flexlora").cells["unseen_loss", "uniform", "fedit_smallest"].pairs
    assert one is not None and other is not None
    assert one.mean == pytest.approx(-other.mean)
    assert one.p == pytest.approx(other.p)


def test_a_clear_winner_is_named_and_what_is_out_of_reach_cannot_win(study_row: MakeRow) -> None:
    verdict = summary(study_row.study(GAPS)).verdicts["unseen_loss", "uniform"]
    assert verdict.winner == "aligned"
    assert verdict.runner_up is not None and verdict.runner_up.arm == "fedit_smallest"
    assert not set(OUT_OF_REACH) & {rival.arm for rival in verdict.rivals}
    assert [rival.arm for rival in verdict.rivals] == ["fedit_smallest", "flexlora", "base"]


def test_scores_that_should_be_high_are_ranked_from_the_top(study_row: MakeRow) -> None:
    found = summary(study_row.study(GAPS))
    assert found.verdicts["rouge_l", "uniform"].winner == "aligned"
    assert found.ranked("rouge_l", "uniform")[0].arm == "fedit_largest"


def test_a_near_tie_names_no_winner_but_the_draws_it_needs(study_row: MakeRow) -> None:
    verdict = summary(study_row.study({**GAPS, "aligned": 0.0}, noise=0.02)).verdicts["unseen_loss", "uniform"]
    assert verdict.winner is None
    assert verdict.runner_up is not None
    assert verdict.tied == (verdict.runner_up.arm,)
    assert verdict.runner_up.pairs.draws_needed is not None and verdict.runner_up.pairs.draws_needed > 8


def test_significance_without_power_is_a_tie(study_row: MakeRow) -> None:
    # Differences with t = 2.6 on 7 degrees of freedom: p = .035, power .62.
    spread = np.array([-1.0, 1.0] * 4) * 0.01
    mean = 2.6 * np.std(spread, ddof=1) / np.sqrt(8)
    rows = [study_row("a", draw, 1.7) for draw in range(8)]
    rows += [study_row("b", draw, 1.7 + float(mean + spread[draw])) for draw in range(8)]
    verdict = summary(rows, "a").verdicts["unseen_loss", "uniform"]
    assert verdict.runner_up is not None
    assert verdict.runner_up.p_holm == pytest.approx(2 * stats.t.sf(2.6, 7))
    assert verdict.runner_up.p_holm < 0.05
    assert (verdict.winner, verdict.tied) == (None, ("b",))


def test_only_test_runs_at_the_chosen_rate_count(study_row: MakeRow) -> None:
    rows = study_row.study({"fedit_smallest": 0.0, "aligned": -0.05})
    rows += [{**row, "learning_rate": 0.1, "unseen": {**row["unseen"], "loss": 0.1}} for row in rows]
    rows += [study_row.tuning("aligned", rate, loss) for rate, loss in ((0.001, 2.0), (0.01, 1.6), (0.1, 1.9))]
    found = summary(rows)
    assert found.cells["unseen_loss", "uniform", "aligned"].mean > 1
    # Without tuning rows, the rate with the most runs counts, here the lower of two.
    assert found.cells["unseen_loss", "uniform", "fedit_smallest"].mean > 1
    assert [flag.kind for flag in found.flags] == []


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_few_draws_give_numbers_with_notes_and_no_winner(study_row: MakeRow, draws: int) -> None:
    found = summary(study_row.study({"fedit_smallest": 0.0, "aligned": -0.005, "base": 0.5}, draws))
    cell = found.cells["unseen_loss", "uniform", "aligned"]
    notes = {1: ("one draw: no interval, no test",), 2: ("two draws: the interval rests on one degree of freedom",)}
    assert cell.notes == notes.get(draws, ())
    assert found.verdicts["unseen_loss", "uniform"].winner is None


def test_missing_pairs_are_noted_and_flagged(study_row: MakeRow) -> None:
    rows = [row for row in study_row.study(GAPS) if row["arm"] != "flexlora" or row["draw"] < 3]
    found = summary(rows)
    cell = found.cells["unseen_loss", "uniform", "flexlora"]
    assert cell.pairs is not None and cell.pairs.num_pairs == 3
    assert cell.notes == ("only 3 draws in common with fedit_smallest",)
    assert [(f.arm, f.detail) for f in found.flags] == [("flexlora", "3 draws of 8; missing 3, 4, 5, 6, 7")]


def test_without_the_reference_there_are_means_and_a_verdict(study_row: MakeRow) -> None:
    found = summary(study_row.study({"aligned": -0.05, "flexlora": 0.02}))
    assert found.cells["unseen_loss", "uniform", "aligned"].notes == ("no draw in common with fedit_smallest",)
    assert found.verdicts["unseen_loss", "uniform"].winner == "aligned"
    assert [flag.kind for flag in found.flags] == ["missing"]


def test_a_contender_without_enough_draws_is_not_ranked(study_row: MakeRow) -> None:
    rows = [row for row in study_row.study(GAPS) if row["arm"] != "aligned" or row["draw"] == 5]
    verdict = summary(rows).verdicts["unseen_loss", "uniform"]
    assert verdict.left_out == ("aligned",)
    assert verdict.first == "fedit_smallest"


def test_runs_that_went_wrong_are_marked_everywhere(study_row: MakeRow) -> None:
    rows = study_row.study(GAPS)
    rows += [study_row("wild", draw, None if draw < 2 else 1.7) for draw in range(8)]
    rows[-1] |= {"failure": "out of memory"}
    found = summary(rows)
    cell = found.cells["unseen_loss", "uniform", "wild"]
    assert (cell.num_draws, cell.num_diverged) == (8, 3)
    assert cell.notes[0].startswith("3 of 8 runs diverged or failed")
    base = losses(rows, "base")
    assert cell.mean == pytest.approx((base[0] + base[1] + base[7] + 5 * 1.7) / 8)
    assert {(flag.arm, flag.kind) for flag in found.flags} == {("wild", "diverged"), ("wild", "failed")}


def test_edges_and_other_rates_are_flagged(study_row: MakeRow) -> None:
    rows = study_row.study({"fedit_smallest": 0.0, "aligned": -0.05})
    rows += [study_row.tuning("aligned", rate, loss) for rate, loss in ((0.01, 1.9), (0.02, 1.6))]
    flags = {flag.kind: flag.detail for flag in summary(rows).flags}
    assert flags == {
        "edge": "learning rate 0.02 is the highest that was tried; a higher one may be better",
        "rate": "test runs are at learning rate 0.01, tuning prefers 0.02",
    }


def test_costs_are_mean_bytes_and_median_times_of_runs_that_did_not_fail(study_row: MakeRow) -> None:
    rows = [study_row("a", 0, up_bytes=100), study_row("a", 1, up_bytes=300), study_row("a", 2, failure="x")]
    # A run that was stopped for hours has as many bytes as others.
    rows += [study_row("a", 3, up_bytes=200, server_seconds=9000.0)]
    costs = summary(rows).costs["uniform", "a"]
    assert (costs.up_bytes, costs.server_seconds) == (200, 0.5)


@pytest.mark.parametrize("stage", ["nothing", "tuning", "one", "equal", "diverged", "whole"])
def test_the_summary_is_json_without_nan_at_every_stage(study_row: MakeRow, stage: str) -> None:
    rows = {
        "nothing": [],
        "tuning": [study_row.tuning("aligned", 0.01, 1.7), study_row.tuning("aligned", 0.02, None)],
        "one": [study_row("aligned")],
        "equal": [study_row(arm, draw) for arm in ("aligned", "fedit_smallest") for draw in range(4)],
        "diverged": [study_row(arm, draw, None) for arm in ("aligned", "fedit_smallest") for draw in range(4)],
        "whole": study_row.study(GAPS),
    }[stage]
    found = summary(rows).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))


def test_an_arm_with_a_run_that_went_wrong_is_never_first_or_tied(study_row: MakeRow) -> None:
    rows = study_row.study({"fedit_smallest": 0.0, "wild": -0.4})
    # Without a base model, the runs that failed count as those of the only other arm.
    rows = [{**row, "failure": "a bug"} if row["arm"] == "wild" and row["draw"] < 2 else row for row in rows]
    found = summary(rows)
    verdict = found.verdicts["unseen_loss", "uniform"]
    assert (verdict.first, verdict.rivals, verdict.left_out) == ("fedit_smallest", (), ("wild",))
    assert "wild cannot: too few draws, or a failed run" in headline(found)


def test_pooled_training_sends_nothing_whatever_its_rows_say(study_row: MakeRow) -> None:
    costs = summary([study_row("fedit_smallest"), study_row("centralised", up_bytes=7, down_bytes=9)]).costs
    assert (costs["uniform", "centralised"].up_bytes, costs["uniform", "centralised"].down_bytes) == (0, 0)
    assert costs["uniform", "fedit_smallest"].up_bytes


def test_methods_that_leave_a_part_with_clients_are_marked_and_not_compared_by_validation(study_row: MakeRow) -> None:
    found = summary([study_row("fedit_smallest"), study_row("fedsa_lora", personal=True, own_loss=1.1)])
    assert ("validation_loss", "uniform", "fedsa_lora") not in found.cells
    assert ("own_loss", "uniform", "fedsa_lora") in found.cells
    assert [flag.kind for flag in found.flags if flag.arm == "fedsa_lora"] == ["personal"]
