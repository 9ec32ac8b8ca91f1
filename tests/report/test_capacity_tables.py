"""Tables of facts recalled say what their rows say."""

from typing import Any

from flexlora.report.capacity_tables import TUNING_DRAW, capacity_tables


def row(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "study": "federated",
        "method": "flexlora",
        "learning_rate": 0.02,
        "draw": 1,
        "num_facts": 8,
        "rank": None,
        "owner": "all",
        "reader": 16,
        "exact_match": 50.0,
        "loss": 1.0,
    }
    return plain | changes


def test_no_rows_give_no_table() -> None:
    assert capacity_tables([]) == [""]


def test_central_training_is_told_at_the_best_rate_of_the_number_most_tried() -> None:
    central = {"study": "central", "method": "fedit", "draw": TUNING_DRAW, "rank": 1, "reader": 1}
    rows = [
        row(**central, num_facts=8, learning_rate=0.01, exact_match=10.0),
        row(**central, num_facts=8, learning_rate=0.02, exact_match=40.0),
        row(**central, num_facts=16, learning_rate=0.02, exact_match=5.0),
    ]
    assert "| 1 | 0.02 | 40 | 5 |" in capacity_tables(rows)


def test_federated_tables_leave_the_tuning_draw_out_and_show_mean_and_range() -> None:
    rows = [
        row(draw=TUNING_DRAW, exact_match=99.0),
        row(draw=1, exact_match=40.0),
        row(draw=2, exact_match=60.0),
        row(draw=1, owner="rank1", exact_match=0.0),
        row(draw=2, owner="rank1", exact_match=2.0),
        row(draw=1, reader=1, exact_match=3.0),
    ]
    lines = capacity_tables(rows)
    assert "| `flexlora` | 0.02 | 2 | 1 (0, 2) | 50 (40, 60) |" in lines
    assert "| `flexlora` | 3 (3, 3) | 50 (40, 60) |" in lines
