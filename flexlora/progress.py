"""Makes the progress bars that the terminal shows."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def moving_bar(console: Console, detail: ProgressColumn, *, hidden: bool, transient: bool = False) -> Progress:
    """Return a bar with a description, ``detail`` and the time left; silent where the console is no terminal.

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
        disable=hidden or not console.is_terminal,
        transient=transient,
    )
