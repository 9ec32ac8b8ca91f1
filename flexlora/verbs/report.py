"""The verb ``report``: writes the page of a run again."""

from pathlib import Path
from typing import Annotated

import typer

from flexlora.errors import FlexLoraError
from flexlora.verbs.arguments import JsonOption, RunArgument
from flexlora.verbs.terminal import out, print_json


def report(
    run_folder: RunArgument,
    others: Annotated[
        list[Path] | None,
        typer.Argument(metavar="OTHER", help="Folders of runs to compare it with on the virtual clock."),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            "--target",
            help="Unseen ROUGE-L to reach; default the run's own, or one that all runs that learned have reached.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write report.html again from what a run has recorded so far, compared with other runs if any are named."""
    from flexlora.report.comparison import comparison_notes, timed_runs
    from flexlora.report.page import write_report
    from flexlora.report.run_folder import read_run
    from flexlora.report.terminal import print_virtual_time

    for folder in (run_folder, *(others or ())):
        if not folder.is_dir():
            raise FlexLoraError(f"RUN and OTHER must be folders of runs; there is no folder {folder}")
    path = write_report(run_folder, others or (), target)
    run, beside = read_run(run_folder), [read_run(other) for other in others or ()]
    notes = comparison_notes(run, beside, target)
    timed, target = timed_runs(run, beside, target)
    if as_json:
        reached = {one.name: one.seconds_to(target) for one in timed}
        found = {"report": str(path), "target_rouge_l": target, "virtual_seconds_to_target": reached, "notes": notes}
        print_json(found)
        return
    print_virtual_time(out, timed, target, notes)
    out.print(f"Wrote {path}", highlight=False, markup=False, soft_wrap=True)
