"""Tells how a run ended, for the verbs that run one."""

from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from flexlora.verbs.leaving import EXIT_NO_PROGRESS
from flexlora.verbs.terminal import err, out, print_json

if TYPE_CHECKING:
    from flexlora.experiment.result import RunResult


def tell_result(result: "RunResult", *, as_json: bool) -> None:
    """Print what a run has come to.

    Raises:
        typer.Exit: If it has learned from no client.
    """
    if as_json:
        print_json(result.summary())
    else:
        from flexlora.experiment.terminal import print_summary

        print_summary(out, result)
    if not result.has_progress:
        err.print(
            f"[bold red]No progress:[/] {escape(result.stopped or 'no client ever sent a usable update')}. "
            f"The reasons are in {escape(str(result.report))}."
        )
        raise typer.Exit(EXIT_NO_PROGRESS)
