"""Shows a table whole at any width: as a table where it fits, else one row below the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import HEAVY_HEAD, Box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flexlora.text import printable

INDENT = 2
LONGEST_WORD = 12
"""Cells of text columns are broken between words, down to this width."""


@dataclass(frozen=True)
class WholeTable:
    """Rows under headers; no cell is ever cut.

    Attributes:
        headers: The first names what the rows are about.
        rows: As many cells as headers each.
        title: Stands above.
        texts: Headers of columns of text, to the left and broken between words; the first always is one. All others
            are numbers, to the right and in one piece.
        styles: Row number -> its style.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    texts: Sequence[str] = ()
    styles: dict[int, str] = field(default_factory=dict)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, or its rows one below the other where the console is too narrow for it."""
        widths = self._least_widths()
        for box, between, edge in ((HEAVY_HEAD, 3, 1), (None, 2, 0)):
            room = options.max_width - edge - between * len(widths) - sum(widths)
            if room >= 0:
                yield self._table(box, self._widened(widths, room))
                return
        if self.title:
            yield Text(self.title, style="italic")
        for number, row in enumerate(self.rows):
            style = self.styles.get(number, "")
            yield Text(printable(row[0]), style=style or "bold")
            cells = zip(self.headers[1:], map(printable, row[1:]), strict=True)
            lines = _packed([f"{header}: {cell}" for header, cell in cells], options.max_width - INDENT)
            yield Padding(Text("\n".join(lines), style=style), (0, 0, 0, INDENT))

    def _table(self, box: Box | None, widths: Sequence[int]) -> Table:
        table = Table(
            title=self.title and Text(self.title),
            title_justify="left",
            header_style="bold",
            box=box,
            pad_edge=bool(box),
        )
        for place, header in enumerate(self.headers):
            # No number is broken: each column is as wide as its longest.
            table.add_column(
                header,
                justify="left" if self._is_text(place) else "right",
                overflow="fold",
                width=widths[place],
            )
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(cell, overflow="fold") for cell in row), style=self.styles.get(number))
        return table

    def _is_text(self, place: int) -> bool:
        return place == 0 or self.headers[place] in self.texts

    def _widened(self, widths: Sequence[int], room: int) -> list[int]:
        """Return the widths with as much of ``room`` as makes columns of text less broken, from the first on."""
        wider = list(widths)
        for place, header in enumerate(self.headers):
            natural = max(map(cell_len, [header, *(row[place] for row in self.rows)]))
            more = min(room, max(0, natural - wider[place]))
            wider[place], room = wider[place] + more, room - more
        return wider

    def _least_widths(self) -> list[int]:
        """Return for each column the width below which a number, or a short word, would be cut."""
        widths = []
        for place, header in enumerate(self.headers):
            cells = [row[place] for row in self.rows]
            words = [word for cell in [header, *cells] for word in cell.split()] if self._is_text(place) else cells
            longest = max((cell_len(word) for word in words), default=1)
            if self._is_text(place):
                longest = min(longest, LONGEST_WORD) if place else min(max(longest, LONGEST_WORD), 2 * LONGEST_WORD)
            # Headers of numbers are broken between words.
            longest = max([longest, *(cell_len(word) for word in header.split())])
            widths.append(longest)
        return widths


def _packed(parts: Sequence[str], width: int) -> list[str]:
    """Return lines of whole parts, as many on each as fit; only a part that is wider than a line is broken later."""
    lines = [""]
    for part in parts:
        if lines[-1] and cell_len(f"{lines[-1]}  {part}") > width:
            lines.append(part)
        else:
            lines[-1] = f"{lines[-1]}  {part}" if lines[-1] else part
    return lines
