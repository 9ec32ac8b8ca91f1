"""Tables in the shape of the paper's, against numbers worked out by hand and scipy."""

from typing import Any

import pytest
from scipy import stats

from flexlora.report.paired import summary
from flexlora.report.paper_tables import category_scores, improvements, paper_part, rounds_to_target

MakeRow = Any


def scored(rouge_l: float) -> dict[str, Any]:
    return {"loss": 1.0, "rouge_l": rouge_l}


def test_improvements_are_paired_by_draw_and_corrected_together(study_row: MakeRow) -> None:
    plain, mixed, ours = [40.0, 42.0, 38.0, 41.0], [41.0, 43.5, 38.5, 43.0], [44.0, 45.5, 42.0, 45.0]
    arms = {"fedit_smallest": plain, "flexlora": mixed, "aligned": ours}
    rows = [study_row(arm, draw, unseen=scored(value)) for arm, own in arms.items() for draw, value in enumerate(own)]
    first, second = improvements(summary(rows))
    assert (first.mixed, second.mixed) == ("flexlora", "aligned")
    assert first.plain_mean == pytest.approx(40.25) and first.pairs.mean == pytest.approx(1.25)
    assert first.percent == pytest.approx(100 * 1.25 / 40.25)
    p_first, p_second = (float(stats.ttest_rel(own, plain).pvalue) for own in (mixed, ours))
    assert p_second < p_first  # So Holm doubles the second and leaves the first.
    assert first.p_holm == pytest.approx(max(p_first, 2 * p_second))
    assert second.p_holm == pytest.approx(2 * p_second)


def test_draws_of_one_arm_alone_are_in_no_pair_and_a_failed_run_is_the_worst_of_its_draw(study_row: MakeRow) -> None:
    rows = [study_row("slora", draw, unseen=scored(30.0 + draw)) for draw in range(3)]
    rows += [study_row("slora_flexlora", draw, unseen=scored(31.0 + 2 * draw)) for draw in (1, 2, 3)]
    (one,) = improvements(summary(rows, "slora"))
    assert one.pairs.num_pairs == 2 and one.pairs.mean == pytest.approx(2.5)
    assert (one.plain_mean, one.mixed_mean) == (31.5, 34.0)
    failed = study_row("slora_flexlora", 0, None)
    (one,) = improvements(summary([*rows, failed, study_row("base", 0, unseen=scored(2.0))], "slora"))
    assert one.pairs.num_pairs == 3 and one.pairs.mean == pytest.approx((2.0 - 30.0 + 2.0 + 3.0) / 3)


def test_categories_are_means_over_draws(study_row: MakeRow) -> None:
    rows = [study_row("aligned", draw, categories={"A": scored(10.0 * draw), "B": scored(5.0)}) for draw in (1, 2)]
    rows += [study_row("fedit_smallest", draw, categories={"A": scored(12.0), "B": scored(6.0)}) for draw in (1, 2)]
    found = summary(rows)
    assert category_scores(found, "uniform", "aligned") == {"A": 15.0, "B": 5.0}
    assert category_scores(found, "elsewhere", "aligned") == {}
    text = "\n".join(paper_part(found))
    assert "| `aligned` | 1, 0, 1 |" in text and "| `flexlora` | – |" in text
    assert "| `A` | – | 12.0 | – | +3.0 |" in text


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"round": 4 * number, "unseen_loss": loss} for number, loss in enumerate(losses)]


def test_rounds_to_the_target_lie_between_evaluations(study_row: MakeRow) -> None:
    # The reference goes from 6 to 1, so its target is 6 - 0.95 * 5 = 1.25.
    rows = [study_row("fedit_smallest", curve=curve(6.0, 1.5, 1.0), up_bytes=1000, down_bytes=1000)]
    rows += [study_row("aligned", curve=curve(6.0, 1.25, 0.9), up_bytes=3000, down_bytes=5000)]
    rows += [study_row("flexlora", curve=curve(6.0, 2.0, 1.3), up_bytes=2000, down_bytes=2000)]
    found = {row.arm: row for row in rounds_to_target(summary(rows), "uniform")}
    assert found["fedit_smallest"].rounds == pytest.approx(4 + 4 * 0.25 / 0.5)
    assert found["aligned"].rounds == pytest.approx(4.0) and found["aligned"].cost == 4.0
    assert found["flexlora"].rounds is None and found["flexlora"].num_reached == 0
    text = "\n".join(paper_part(summary(rows)))
    assert "| `aligned` | 4.0 × 4.00 = 16 |" in text
    assert "| `flexlora` | never (0 of 1) |" in text


def test_half_of_the_draws_must_get_there(study_row: MakeRow) -> None:
    rows = [study_row("fedit_smallest", draw, curve=curve(6.0, 1.5, 1.0)) for draw in range(3)]
    rows += [study_row("aligned", draw, curve=curve(6.0, 2.0, last)) for draw, last in enumerate((1.0, 1.25, 1.9))]
    rows += [study_row("flexlora", draw, curve=curve(6.0, 2.0, last)) for draw, last in enumerate((1.0, 1.9, 1.9))]
    found = {row.arm: row for row in rounds_to_target(summary(rows), "uniform")}
    assert found["aligned"].rounds == pytest.approx(8.0) and found["aligned"].num_reached == 2
    assert found["flexlora"].rounds is None and found["flexlora"].num_reached == 1


def test_runs_without_the_papers_methods_have_no_tables(study_row: MakeRow) -> None:
    rows = [study_row("zero_pad", curve=[])]
    assert paper_part(summary(rows)) == ["No study has the methods of the paper's tables."]
