"""Prints how runs went on the virtual clock, and what models answered."""

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flexlora.report.shown_answers import ShownExample, cut
from flexlora.report.virtual_time import VIRTUAL_COLUMNS, TimedRun, virtual_cells
from flexlora.report.whole_table import WholeTable
from flexlora.text import number_text, printable

WIDE_COLUMNS = 120
"""From this width on every column is shown."""

_LONGEST_PROMPT = 240
_LONGEST_ANSWER = 160


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


def print_answers(console: Console, examples: Sequence[ShownExample], rule: str) -> None:
    """Print examples with what is expected and what each model answered, shortened, below the rule that chose them."""
    if not examples:
        return
    console.print(f"Answers to unseen tasks. {printable(rule)}", style="italic", highlight=False, markup=False)
    for example in examples:
        console.print(Text(_line(example.prompt, _LONGEST_PROMPT), style="bold"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        rows = [("Expected", " or ".join(example.references[:2])), *((one.model, one.text) for one in example.answers)]
        for name, text in rows:
            grid.add_row(Text(name, style="dim"), Text(_line(text, _LONGEST_ANSWER)))
        console.print(Padding(grid, (0, 0, 0, 2), expand=False))


def _line(text: str, longest: int) -> str:
    """Return a text in one line, its middle left out if it is long."""
    return printable(cut(" ".join(text.split()), longest)) or "(nothing)"
