"""Shows how far a comparison is: runs done, runs left, minutes left, and a page that is never older than minutes."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from flexlora.errors import FlexLoraError
from flexlora.experiment.compare import CompareEvent
from flexlora.report.compare_page import write_page

SECONDS_PER_MINUTE = 60
LEAST_SECONDS_BETWEEN_PAGES = 60.0
LARGEST_SHARE_OF_PAGES = 0.02
"""Of the time that a comparison takes."""


class CompareProgress:
    """A bar over the runs of a comparison, with one line for each run that ended."""

    def __init__(self, console: Console, page: "FreshPage | None" = None, *, hidden: bool = False) -> None:
        """Show nothing yet.

        Args:
            console: Where to show it.
            page: Told the same.
            hidden: Whether only the page is told.
        """
        self._page = page
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs, {task.fields[left]}"),
            console=console,
            disable=hidden,
        )
        self._task = self._bar.add_task("Comparing", total=None, left="starting")

    def __enter__(self) -> "CompareProgress":
        """Start to show."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop to show."""
        self._bar.stop()

    def __call__(self, event: CompareEvent) -> None:
        """Show what a comparison tells."""
        if self._page is not None:
            self._page(event)
        left = "starting" if event.seconds_left is None else _minutes(event.seconds_left)
        self._bar.update(self._task, completed=event.num_done, total=event.num_done + event.num_left, left=left)
        if event.row is not None:
            self._bar.console.print(_line(event.row), highlight=False, markup=False, soft_wrap=True)


class FreshPage:
    """Writes the page of a comparison while it runs, at most once a minute."""

    def __init__(self, folder: Path, reference: str) -> None:
        """Write nothing yet."""
        self._folder, self._reference, self._next = folder, reference, 0.0

    def __call__(self, event: CompareEvent) -> None:
        """Write the page after a run, if it is time."""
        started = time.monotonic()
        if event.row is None or started < self._next:
            return
        try:
            write_page(self._folder, self._reference)
        except FlexLoraError:
            pass  # Said at the end; the runs are worth more than a page on the way.
        took = time.monotonic() - started
        self._next = started + max(LEAST_SECONDS_BETWEEN_PAGES, took / LARGEST_SHARE_OF_PAGES)


def _minutes(seconds: float) -> str:
    return f"{seconds / SECONDS_PER_MINUTE:,.1f} minutes left"


def _line(row: Mapping[str, Any]) -> str:
    """Return a finished run in words."""
    kind = "tuning" if row["phase"] == "tuning" else "draw"
    loss = row["validation_loss"]
    parts = [] if loss is None else [f"validation loss {loss:.4f}"]
    if row["unseen"]:
        parts.append(f"unseen {row['unseen']['loss']:.4f}")
    if row["failure"] or not parts:
        parts.append(f"failed: {row['failure'] or 'nothing could be measured'}")
    outcome = ", ".join(parts)
    rate = f" at {row['learning_rate']:g}" if row["learning_rate"] else ""
    return f"  {kind} {row['draw'] + 1}, {row['distribution']}: {row['arm']}{rate}, {outcome}"
