"""The verb ``doctor``: checks versions, devices and files."""

import typer
from rich.table import Table
from rich.text import Text

from flexlora.progress import stage
from flexlora.verbs.arguments import JsonOption
from flexlora.verbs.leaving import EXIT_MACHINE
from flexlora.verbs.terminal import err, out, print_json


def doctor(as_json: JsonOption = False) -> None:
    """Check versions, devices and files, and say how to fix what is wrong."""
    from flexlora.experiment.doctor import examine

    with stage(err, "Looking at versions, devices and files", hidden=as_json):
        findings = examine()
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        table = Table(box=None, pad_edge=False)
        for header in ("", "Check", "Found", "What to do"):
            table.add_column(header, overflow="fold")
        for finding in findings:
            mark = "[green]ok[/]" if finding.is_fine else "[yellow]!![/]"
            table.add_row(mark, Text(finding.check), Text(finding.found), Text(finding.fix))
        out.print(table)
    if any(finding.is_fatal for finding in findings):
        raise typer.Exit(EXIT_MACHINE)
