"""Prints the main table of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flexlora.report.paired import Summary
from flexlora.report.study_tables import MAIN_COLUMNS, MainRow, main_rows
from flexlora.report.study_words import headline
from flexlora.text import count_text

COLOURS = {"better": "green", "worse": "red"}
COLUMN_SETS = (
    MAIN_COLUMNS,
    ("arm", "mean ± s.d.", "difference", "95 % interval", "p (Holm)", "needs"),
    ("arm", "mean ± s.d.", "difference", "p (Holm)", "needs"),
    ("arm", "difference", "p (Holm)"),
)
"""Columns to show, the widest set first; the first that fits is taken, else the last."""


def summary_table(summary: Summary) -> RenderableType:
    """Return the headline, the main table of every distribution and the number of flags, as something to print."""
    parts: list[RenderableType] = [Text(headline(summary), style="bold")]
    measure = summary.headline
    if measure is not None:
        for distribution in summary.distributions:
            if rows := main_rows(summary, measure, distribution):
                title = f"{distribution}: {measure.title.lower()}, {measure.unit}"
                parts += [Text(), FittingTable(title, rows)]
        parts += [Text(), Text(_legend(summary), style="dim")]
    if summary.flags:
        parts.append(Text(f"{count_text(len(summary.flags), 'reservation')}; the page lists them.", style="yellow"))
    return Group(*parts)


@dataclass(frozen=True)
class FittingTable:
    """The main table of one distribution, with the columns that the terminal has room for."""

    title: str
    rows: list[MainRow]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table with as many columns as fit."""
        roomy = options.update(width=10_000)
        tables = [self._table(columns) for columns in COLUMN_SETS]
        fitting = [table for table in tables if Measurement.get(console, roomy, table).maximum <= options.max_width]
        yield (fitting or tables[-1:])[0]

    def _table(self, columns: Sequence[str]) -> Table:
        places = [MAIN_COLUMNS.index(name) for name in columns]
        table = Table(title=Text(self.title), title_justify="left", header_style="bold")
        for place in places:
            table.add_column(MAIN_COLUMNS[place], justify="right" if place else "left", no_wrap=True)
        for row in self.rows:
            style = "bold" if row.place in ("first", "tied") else "dim" if row.place == "bound" else ""
            cells = [Text(cell) for cell in row.cells]
            cells[MAIN_COLUMNS.index("difference")].stylize(COLOURS.get(row.effect or "", ""))
            table.add_row(*(cells[place] for place in places), style=style)
        return table


def _legend(summary: Summary) -> str:
    words = [
        f"Differences are to {summary.reference}, paired by draw.",
        "p is Holm-corrected over all arms and distributions.",
        "Flips: chance that three draws give the other sign. Needs: draws for a power of 80 %.",
        "Bold: first or tied for first. Dim: out of reach of these clients.",
    ]
    cells = summary.cells.values()
    if any(cell.num_diverged for cell in cells):
        words.append("†: a run diverged or failed and counts as the worst of its draw.")
    if any(cell.pairs and cell.pairs.test == "wilcoxon" for cell in cells):
        words.append("*: Wilcoxon's test, because all differences are equal.")
    return " ".join(words)
