"""Prints how runs went on the virtual clock."""

from collections.abc import Sequence

from rich.console import Console

from flexlora.report.virtual_time import VIRTUAL_COLUMNS, TimedRun, virtual_cells
from flexlora.report.whole_table import WholeTable
from flexlora.text import number_text, printable

WIDE_COLUMNS = 120

"""From this width on every column is shown."""


def print_virtual_time(
    console: Console, runs: Sequence[TimedRun], target: float | None, notes: Sequence[str] = ()
) -> None:
    """Print how runs went on the virtual clock, if any had one, and what to know about them."""
    if runs:
        console.print(_virtual_table(console, runs, target))
    for note in notes:
        console.print(printable(note), style="yellow", highlight=False, markup=False)


def _virtual_table(console: Console, runs: Sequence[TimedRun], target: float | None) -> WholeTable:
    names = (*VIRTUAL_COLUMNS, "to target" if target is None else f"to {number_text(target)}")
    wide = console.width >= WIDE_COLUMNS
    shown = [place for place, name in enumerate(names) if wide or name not in ("rounds", "sent")]
    cells = [virtual_cells(run, target) for run in runs]
    return WholeTable(
        [names[place] for place in shown],
        [[row[place] for place in shown] for row in cells],
        title="On the virtual clock (ROUGE-L on unseen tasks)",
        texts=(names[1],),
    )
