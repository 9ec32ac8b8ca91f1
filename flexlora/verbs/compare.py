"""The verb ``compare``: compares methods on paired draws."""

import time
from pathlib import Path
from typing import Annotated

import typer

from flexlora.limits import num_cores
from flexlora.progress import stage
from flexlora.verbs.arguments import ConfigArgument, JsonOption, OverridesArgument
from flexlora.verbs.leaving import interruptible
from flexlora.verbs.terminal import err, hide_other_progress_bars, out, print_json, reading


def compare(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods", help="[LABEL=]METHOD[:KEY=VALUE]...[@RATE], separated by commas; @RATE fixes a rate."
        ),
    ] = "fedit,flexlora,aligned",
    draws: Annotated[int, typer.Option("--draws", help="Paired draws that count; at least 8 for a claim.")] = 8,
    tuning_draws: Annotated[
        int, typer.Option("--tuning-draws", help="Draws that choose learning rates; 0 takes the configuration's.")
    ] = 2,
    trials: Annotated[int, typer.Option("--trials", help="Most learning rates tried for each method.")] = 5,
    distributions: Annotated[
        str | None, typer.Option("--distributions", help="Of client types, as uniform,heavy_tail_light.")
    ] = None,
    tune_on: Annotated[
        str | None,
        typer.Option("--tune-on", help="The distribution that learning rates are chosen on; default each its own."),
    ] = None,
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=1, help="Points of each learning curve; more of them cost more time.")
    ] = 8,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="Label of the arm that differences are to; default fedit_smallest, without controls the first method.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs side by side, one thread each; default one per core.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0, help="Start no further run after this; the same command goes on later."),
    ] = None,
    no_text: Annotated[bool, typer.Option("--no-text", help="Score losses only; generate no answers.")] = False,
    no_controls: Annotated[bool, typer.Option("--no-controls", help="Leave the controls out.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the comparison; goes on with what is in it.")] = Path(
        "runs/compare"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget what is in --out first.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Make runs that failed again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the final table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare methods on paired draws, each at its own learning rate, with all controls; see docs/compare.md."""
    with reading(config):
        from flexlora.experiment.compare_arms import read_arms
        from flexlora.experiment.compare_place import check_place
        from flexlora.experiment.compare_study import make_study, reference_of

        study = make_study(
            config,
            overrides or (),
            read_arms(methods),
            distributions=[name.strip() for name in (distributions or "").split(",") if name.strip()],
            draws=draws,
            tuning_draws=tuning_draws,
            trials=trials,
            evaluations=evaluations,
            text=not no_text,
            tune_on=tune_on,
            with_controls=not no_controls,
        )
        reference = reference_of(study, reference)
        check_place(study, folder, overwrite, jobs or num_cores())
    with stage(err, "Loading libraries", hidden=quiet or as_json):
        # Only here: loading torch takes seconds, and a mistake is told before.
        from flexlora.experiment.compare import run_comparison
        from flexlora.experiment.compare_progress import CompareProgress, FreshPage
        from flexlora.report.compare_page import write_page
        from flexlora.report.compare_terminal import summary_table
        from flexlora.report.paired import summary

        hide_other_progress_bars()
    until = None if minutes is None else time.time() + 60 * minutes
    with (
        interruptible("the same command continues with the runs that are left"),
        CompareProgress(err, FreshPage(folder, reference), hidden=quiet or as_json) as progress,
    ):
        rows = run_comparison(
            study,
            folder,
            jobs=jobs or num_cores(),
            overwrite=overwrite,
            until=until,
            retry_failed=retry_failed,
            notify=progress,
        )
    found = summary(rows, reference=reference)
    page = write_page(folder, reference) if rows else None
    if as_json:
        print_json({"folder": str(folder), "page": page and str(page), "summary": found.to_json()})
    else:
        out.print(summary_table(found))
        if page is not None:
            out.print(f"Page     {page}", highlight=False, markup=False, soft_wrap=True)
