"""Forest plots put numbers where they belong."""

import re

import pytest

from flexlora.report.forest_chart import Difference, forest_chart

ROWS = [
    Difference("aligned", -0.05, -0.07, -0.03, "better"),
    Difference("flexlora", 0.0, -0.02, 0.02, "open"),
    Difference("fedit_largest", -0.1, -0.1, -0.1, "better", is_bound=True),
    Difference("base", 0.5, 0.4, 0.6, "worse", is_far=True),
]


def test_squares_lie_at_their_means_on_one_scale() -> None:
    chart = forest_chart(ROWS, what="Loss", digits=2, lower_is_better=True)
    assert chart is not None
    squares = [float(x) + 4 for x in re.findall(r'class="square[^"]*" x="([\d.]+)"', chart.svg)]
    zero = float(re.findall(r'class="zero" x1="([\d.]+)"', chart.svg)[0])
    aligned, flexlora, largest = squares
    assert flexlora == pytest.approx(zero, abs=0.1)
    assert (zero - aligned) * 2 == pytest.approx(zero - largest, abs=0.3)
    whisker = re.findall(r'class="whisker better" x1="([\d.]+)" x2="([\d.]+)"', chart.svg)[0]
    assert float(whisker[1]) - float(whisker[0]) == pytest.approx((zero - aligned) / 0.05 * 0.04, abs=0.3)


def test_what_lies_far_outside_is_an_arrow_with_its_number() -> None:
    chart = forest_chart(ROWS, what="Loss", digits=2, lower_is_better=True)
    assert chart is not None
    assert chart.svg.count('class="edge worse"') == 1
    assert "+0.50" in chart.svg
    assert chart.svg.count("square better bound") == 1


def test_the_description_has_every_number() -> None:
    chart = forest_chart(
        [*ROWS, Difference("new", 0.1, None, None, "open")], what="Loss", digits=2, lower_is_better=True
    )
    assert chart is not None
    assert "aligned −0.05 (−0.07 to −0.03)" in chart.description
    assert "new +0.10." in chart.description


def test_the_better_side_follows_the_measure() -> None:
    low = forest_chart(ROWS, what="Loss", digits=2, lower_is_better=True)
    high = forest_chart(ROWS, what="ROUGE-L", digits=2, lower_is_better=False)
    assert low is not None and high is not None
    assert "← better" in low.svg and "← worse" in high.svg


def test_nothing_gives_no_chart() -> None:
    assert forest_chart([], what="Loss", digits=2, lower_is_better=True) is None
