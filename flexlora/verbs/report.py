"""The verb ``report``: writes the page of a run again, or a page that compares several."""

from pathlib import Path
from typing import Annotated

import typer

from flexlora.errors import FlexLoraError
from flexlora.progress import stage
from flexlora.text import printable
from flexlora.verbs.arguments import JsonOption, RunArgument
from flexlora.verbs.terminal import err, out, print_json

COMPARISON = Path("comparison.html")


def report(
    run_folder: RunArgument,
    others: Annotated[
        list[Path] | None,
        typer.Argument(metavar="OTHER", help="Folders of runs to compare it with; differences are to the first."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help=f"The page; default report.html in the folder of one run, {COMPARISON} here for several. A "
            "comparison never replaces the report of a run.",
        ),
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
    """Write the report of a run again from what it has recorded so far, or a page that compares runs."""
    from flexlora.report.page_place import check_comparison_place, check_report_place
    from flexlora.report.run_folder import check_run, check_target

    folders = [run_folder, *(others or ())]
    for folder in folders:
        if not folder.is_dir():
            raise FlexLoraError(f"RUN and OTHER must be folders of runs; there is no folder {folder}")
        check_run(folder)
    is_one = len(folders) == 1
    if not is_one and len({folder.resolve() for folder in folders}) == 1:
        raise FlexLoraError(f"a comparison needs two different runs; got {run_folder} {len(folders)} times")
    if not is_one:
        check_comparison_place(page or COMPARISON)
    elif page is not None:
        check_report_place(page, run_folder)
    check_target(target)
    with stage(err, "Reading records and writing the page", hidden=as_json):
        # Only here: they load what computes intervals.
        from flexlora.report.comparison import comparison_notes, timed_runs
        from flexlora.report.page import write_report
        from flexlora.report.run_folder import read_run
        from flexlora.report.runs_page import summary_of, write_runs_page
        from flexlora.report.terminal import print_virtual_time

        if is_one:
            path = write_report(run_folder, (), target, page)
        else:
            path = write_runs_page(folders, page or COMPARISON, target)
        runs = [read_run(folder) for folder in folders]
        notes = comparison_notes(runs[0], runs[1:], target)
        timed, target = timed_runs(runs[0], runs[1:], target)
        found = summary_of(runs)
    if as_json:
        reached = {one.name: one.seconds_to(target) for one in timed}
        times = {"target_rouge_l": target, "virtual_seconds_to_target": reached}
        print_json({"report": str(path), **times, "notes": [*found["notes"], *notes], "runs": found["runs"]})
        return
    print_virtual_time(out, timed, target, notes if timed else ())
    for line in [*([] if is_one else [found["headline"]]), *found["notes"], f"Wrote {path}"]:
        out.print(printable(line), highlight=False, markup=False, soft_wrap=True)
