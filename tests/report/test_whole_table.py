"""Tables are whole at any width: every cell can be read."""

from io import StringIO

import pytest
from rich.cells import cell_len
from rich.console import Console

from flexlora.report.whole_table import WholeTable

HEADERS = ("type", "ranks", "clients", "memory", "down", "all the way up", "time")
ROWS = (
    ("type1", "1 in every module", "1,560", "123.4 MB", "897 kB", "64.7 kB", "506 ms"),
    (
        "a-type-with-quite-a-name",
        "4 (q, k, v, o), 16 (gate, up, down)",
        "2",
        "9.9 GB",
        "1.2 MB",
        "639 kB",
        "1 h 02 min",
    ),
)


def shown(width: int) -> str:
    console = Console(file=StringIO(), force_terminal=True, color_system=None, width=width)
    console.print(WholeTable(HEADERS, ROWS, title="One client, one round", texts=("ranks",)))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 50, 60, 72, 80, 100, 120, 200])
def test_no_number_is_cut_and_no_line_is_too_long(width: int) -> None:
    text = shown(width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for row in ROWS:
        for word in " ".join(HEADERS).split():
            assert word in text
        for cell in row[2:]:
            assert cell in text
        for word in row[1].split():
            assert word in text
        assert row[0] in text.replace("\n", "")


def test_a_wide_console_has_a_table_and_a_narrow_one_rows() -> None:
    assert "┃" in shown(120) and "memory: 123.4 MB" not in shown(120)
    assert "┃" not in shown(60) and "memory: 123.4 MB" in shown(60)
