"""Makes the progress bars that terminals and notebooks show."""

import importlib.util

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def moving_bar(console: Console, detail: ProgressColumn, *, hidden: bool, transient: bool = False) -> Progress:
    """Return a bar with a description, ``detail`` and the time left; silent where the console cannot move it.

    With ``transient`` it leaves nothing behind.
    """
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=24),
        detail,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=hidden or not _can_move(console),
        transient=transient,
    )


def _can_move(console: Console) -> bool:
    # Without widgets, rich warns in a notebook and shows nothing.
    return importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
