"""The table on the terminal fits, and says what its marks mean."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from flexlora.report.compare_terminal import summary_table
from flexlora.report.paired import summary


def printed(rows: list[Any], width: int) -> str:
    text = StringIO()
    Console(file=text, width=width).print(summary_table(summary(rows)))
    return text.getvalue()


@pytest.mark.parametrize(
    ("width", "shown", "hidden"), [(130, "power", "–x"), (80, "needs", "power"), (50, "p (Holm)", "needs")]
)
def test_columns_that_do_not_fit_are_left_out_whole(study_row: Any, width: int, shown: str, hidden: str) -> None:
    rows = study_row.study({"fedit_smallest": 0.0, "aligned": -0.05, "[bold]": 0.1})
    text = printed(rows, width)
    table = text[text.index("┏") : text.index("┘")]
    assert shown in table and hidden not in table and "…" not in table
    assert max(map(len, text.splitlines())) <= width
    assert "[bold]" in table


def test_marks_are_explained_and_reservations_counted(study_row: Any) -> None:
    rows = study_row.study({"fedit_smallest": 0.0, "aligned": -0.05}) + [study_row("wild", d, None) for d in range(8)]
    text = " ".join(printed(rows, 130).split())
    assert "wild †" in text and "†: a run diverged" in text
    assert "1 reservation; the page lists them." in text


def test_nothing_measured_prints_a_sentence() -> None:
    assert printed([], 80).strip() == "No test run has ended yet."
