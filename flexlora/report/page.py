"""Writes `report.html` from a run folder: one file that needs nothing else, for a screen, a phone or paper."""

import math
from collections.abc import Sequence
from pathlib import Path

from flexlora.files import write_whole
from flexlora.report import figures
from flexlora.report.comparison import comparison_notes, timed_runs
from flexlora.report.dot_row import dot_row
from flexlora.report.headline import headline, notices, status, tiles
from flexlora.report.participation import device_table, failure_table, plan_table
from flexlora.report.run_folder import RunFolder, read_run
from flexlora.report.score_tables import category_table, fairness_table, summary_table, total_rows
from flexlora.report.spectra import spectra_view
from flexlora.report.spectra_charts import heat_class
from flexlora.report.templates import environment
from flexlora.report.wall_time import time_table

REPORT_FILE = "report.html"

MAX_FAILURES = 200


def write_report(run_folder: Path | str, others: Sequence[Path | str] = (), target: float | None = None) -> Path:
    """Write `report.html` into a run folder, atomically, and return its path.

    Works on finished, interrupted and running runs alike: what has not been measured is said to be missing.

    Args:
        run_folder: What the report is about.
        others: Folders of runs to show beside it on the virtual clock.
        target: Unseen ROUGE-L whose virtual time is given, 0 to 100; None takes the run's own, or the best of
            the weakest run that scored above its base model.

    Raises:
        ReportError: A folder holds nothing that a run writes, or ``target`` is out of its range.
        RecordsError: A file of a run is damaged.
    """
    run_folder = Path(run_folder)
    page = render(read_run(run_folder), [read_run(Path(other)) for other in others], target)
    path = run_folder / REPORT_FILE
    # The name of a folder may hold bytes that are not text.
    write_whole(path, page.encode(errors="replace"))
    return path


def render(run: RunFolder, others: Sequence[RunFolder] = (), target: float | None = None) -> str:
    """Return the page of a run; see `write_report`."""
    failures = failure_table(run.records)
    fairness = fairness_table(run.records, run.references, run.manifest)
    categories = category_table(run.records, run.references)
    totals = total_rows(run.records, run.references)
    timed, chosen = timed_runs(run, others, target)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            run=run,
            headline=headline(run),
            status=status(run),
            notices=notices(run),
            tiles=tiles(run),
            summary=summary_table(run.records, run.references, run.manifest.method if run.manifest else None),
            curves=figures.curves(run),
            categories=categories,
            totals=totals,
            category_top=_top(
                [score for row in [*categories, *totals] for score in (row.base, row.federated, row.fedit)]
            ),
            plans=plan_table(run.records, run.manifest),
            participation=figures.participation(run),
            spectra=spectra_view(run),
            energy=figures.energy(run),
            traffic=figures.traffic(run),
            fairness=fairness,
            fairness_top=_top([score for row in fairness for score in (row.base, row.local_only, row.federated)]),
            times=time_table(run.records),
            time_figure=figures.stage_times(run),
            timed=timed,
            target=chosen,
            timed_notes=comparison_notes(run, others, target),
            timed_figures=figures.timed_curves(timed, chosen),
            devices=device_table(run.records, run.manifest),
            failures=failures[:MAX_FAILURES],
            num_failures=len(failures),
            example_rank=max((rank for ranks in run.plan_ranks.values() for rank in ranks.values()), default=8),
            dot_row=dot_row,
            heat_class=heat_class,
            styles=figures.MODEL_STYLES,
        )
    )


def _top(values: Sequence[float | None]) -> float:
    return max([10.0, *(10 * math.ceil(value / 10) for value in values if value is not None)])
