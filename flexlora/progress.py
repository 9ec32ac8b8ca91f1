"""Makes the progress bars that terminals and notebooks show."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

FIRST_SILENCE, LONGEST_SILENCE = 2.0, 60.0
"""Seconds without a line after which a log gets one; each time twice as many, up to the second."""

LABEL_CELLS, CLOCK_CELLS = 10, 7
"""Width of what a stage bar is called, ``base model`` at most, and of the time since it began."""

NARROW_COLUMNS = 80
"""Below this width bars are short, so that the words beside them are seen."""


def moving_bar(console: Console, detail: ProgressColumn, *, hidden: bool, transient: bool = False) -> Progress:
    """Return a bar with a description, ``detail`` and the time left; silent where the console cannot move it.

    With ``transient`` it leaves nothing behind.
    """
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=_bar_width(console)),
        detail,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=hidden or not can_move(console),
        transient=transient,
    )


def stage_bars(console: Console, *, hidden: bool) -> Progress:
    """Return bars with a description, the time since each began, and the field ``detail``, cut to the console."""
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False, table_column=Column(width=LABEL_CELLS)),
        BarColumn(bar_width=_bar_width(console)),
        TimeElapsedColumn(),
        TextColumn(
            "{task.fields[detail]}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", width=_detail_width(console)),
        ),
        console=console,
        disable=hidden or not can_move(console),
    )


@contextmanager
def stage(console: Console, title: str, *, hidden: bool = False) -> Iterator[None]:
    """Say at once what a ``with`` block does, and move as long as it lasts, for work nobody knows the length of.

    A log gets one line; a terminal gets a bar that leaves nothing behind.
    """
    if not hidden and not can_move(console):
        console.print(title, style="bold cyan", highlight=False, markup=False)
    bars = Progress(
        TextColumn("{task.description}", style="bold cyan", markup=False),
        BarColumn(bar_width=_bar_width(console)),
        TimeElapsedColumn(),
        console=console,
        disable=hidden or not can_move(console),
        transient=True,
    )
    bars.add_task(title, total=None)
    with bars:
        yield


def quiet_clock(clock: Callable[[], float]) -> Callable[..., bool]:
    """Return a function that says whether a log has been silent for long enough for a line on how far work is.

    Called with ``printed=True`` it notes that a line has just been printed.
    """
    last, silence = clock(), FIRST_SILENCE

    def is_due(*, printed: bool = False) -> bool:
        """Return whether a line is due."""
        nonlocal last, silence
        now = clock()
        due = not printed and now - last >= silence
        if due:
            silence = min(LONGEST_SILENCE, 2 * silence)
        if due or printed:
            last = now
        return due

    return is_due


def can_move(console: Console) -> bool:
    """Return whether a console can show a bar that moves."""
    # Without widgets, rich warns in a notebook and shows nothing.
    return importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal


def _bar_width(console: Console) -> int:
    return 12 if console.width < NARROW_COLUMNS else 24


def _detail_width(console: Console) -> int:
    """Return the cells that are left beside label, bar and time, with one between them."""
    return max(8, console.width - LABEL_CELLS - _bar_width(console) - CLOCK_CELLS - 4)
