"""Prints how runs went on the virtual clock."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexlora.report.virtual_time import VIRTUAL_COLUMNS, TimedRun, virtual_cells
from flexlora.text import number_text

WIDE_COLUMNS = 120

"""From this width on every column is shown."""


def print_virtual_time(
    console: Console, runs: Sequence[TimedRun], target: float | None, notes: Sequence[str] = ()
) -> None:
    """Print how runs went on the virtual clock, if any had one, and what to know about them."""
    if runs:
        console.print(_virtual_table(console, runs, target))
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False)


def _virtual_table(console: Console, runs: Sequence[TimedRun], target: float | None) -> Table:
    table = Table(title="On the virtual clock (ROUGE-L on unseen tasks)", title_justify="left", header_style="bold")
    names = (*VIRTUAL_COLUMNS, "to target" if target is None else f"to {number_text(target)}")
    wide = console.width >= WIDE_COLUMNS
    shown = [index for index, name in enumerate(names) if wide or name not in ("rounds", "sent")]
    for index in shown:
        table.add_column(names[index], justify="left" if index < 2 else "right", no_wrap=index > 0)
    for run in runs:
        cells = virtual_cells(run, target)
        table.add_row(*(Text(cells[index]) for index in shown))
    return table
