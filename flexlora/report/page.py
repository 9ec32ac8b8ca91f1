"""Writes `report.html` from a run folder: one file that needs nothing else, for a screen, a phone or paper."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.files import making_parents, write_whole
from flexlora.report import figures
from flexlora.report.comparison import comparison_notes, timed_runs
from flexlora.report.dot_row import dot_row
from flexlora.report.falls import best_of, best_validation_round
from flexlora.report.first_screen import cards
from flexlora.report.group_tables import category_table, fairness_table, total_rows
from flexlora.report.headline import headline, notices, status
from flexlora.report.page_place import REPORT_FILE, REPORT_GENERATOR, check_report_place
from flexlora.report.participation import device_table, failure_table, plan_table
from flexlora.report.plain_rows import csv_text, json_text, round_rows, score_rows, task_rows
from flexlora.report.plan_names import DEVICES_OF_TYPES
from flexlora.report.rank_choice import chosen_rank, rank_rows
from flexlora.report.run_folder import RunFolder, read_run
from flexlora.report.score_tables import summary_table
from flexlora.report.shown_answers import answer_groups
from flexlora.report.spectra import spectra_view
from flexlora.report.spectra_charts import heat_class
from flexlora.report.task_differences import LEAST_CLIENTS, LEAST_TASKS
from flexlora.report.templates import environment
from flexlora.report.wall_time import time_table

MAX_FAILURES = 200

SECTIONS = {
    "results": "Results",
    "answers": "Answers",
    "curves": "Curves",
    "categories": "Categories",
    "fairness": "Who gains",
    "ranks": "Which rank",
    "clients": "Clients",
    "energy": "Rank collapse",
    "spectra": "Spectra",
    "traffic": "Traffic",
    "time": "Time",
    "virtual-time": "Virtual time",
    "failures": "Failures",
    "use": "Use it",
    "configuration": "Configuration",
}
"""Section -> what its link says, in the order of the page; a section with nothing in it is left out, with its link."""


def write_report(
    run_folder: Path | str,
    others: Sequence[Path | str] = (),
    target: float | None = None,
    out: Path | str | None = None,
) -> Path:
    """Write the report of a run, atomically, and return its path.

    Works on finished, interrupted and running runs alike: what has not been measured is left out.

    Args:
        run_folder: What the report is about.
        others: Folders of runs to show beside it on the virtual clock.
        target: Unseen ROUGE-L whose virtual time is given, 0 to 100; None takes the run's own, or the best of
            the weakest run that scored above its base model.
        out: The page, which replaces an earlier report of a run and nothing else; None is `report.html` in the folder.

    Raises:
        ReportError: A folder holds nothing that a run writes, ``target`` is out of its range, or ``out`` is another
            file.
        RecordsError: A file of a run is damaged.
    """
    run_folder = Path(run_folder)
    page = render(read_run(run_folder), [read_run(Path(other)) for other in others], target)
    path = run_folder / REPORT_FILE if out is None else Path(out)
    if out is not None:
        check_report_place(path, run_folder)
    with making_parents(path):
        write_page_file(path, page)
    return path


def write_page_file(path: Path, page: str) -> None:
    """Write a page, atomically; what is no text, as in the name of a folder or an answer, becomes question marks."""
    write_whole(path, page.encode(errors="replace"))


def render(run: RunFolder, others: Sequence[RunFolder] = (), target: float | None = None) -> str:
    """Return the page of a run; see `write_report`."""
    shown = {**_outcome(run), **_details(run), **_virtual_time(run, others, target)}
    sections = [(key, name) for key, name in SECTIONS.items() if _has(key, run, shown)]
    return (
        environment()
        .get_template("page.html.j2")
        .render(run=run, sections=sections, generator=REPORT_GENERATOR, **shown)
    )


def _outcome(run: RunFolder) -> dict[str, Any]:
    """Return what the page shows of scores."""
    fairness = fairness_table(run.records, run.references, run.manifest)
    categories = category_table(run.records, run.references)
    totals = total_rows(run.records, run.references)
    rows = [*categories, *totals]
    ranks = rank_rows(run)
    fall = best_of(run.records)
    best_round = best_validation_round(run.records)
    return {
        "headline": headline(run),
        "status": status(run),
        "fall": fall.in_words() if fall and fall.is_told else None,
        "best_round": best_round if best_round and best_round[0] > 0 else None,
        "notices": notices(run),
        "cards": cards(run),
        "summary": summary_table(run.records, run.references, run.manifest.method if run.manifest else None),
        "curves": figures.curves(run),
        "answers": answer_groups(run.answers, _finished_models(run)),
        "categories": categories,
        "totals": totals,
        "has_gains": any(row.difference is not None for row in categories),
        "category_top": _top([score for row in rows for score in (row.base, row.federated, row.fedit)]),
        "fairness": fairness,
        "has_alone": any(row.local_only is not None for row in fairness),
        "fairness_top": _top([score for row in fairness for score in (row.base, row.local_only, row.federated)]),
        "ranks": ranks,
        "chosen": chosen_rank(ranks),
        "least_tasks": LEAST_TASKS,
        "least_clients": LEAST_CLIENTS,
        "styles": figures.MODEL_STYLES,
        "dot_row": dot_row,
        **_downloads(run),
    }


def _details(run: RunFolder) -> dict[str, Any]:
    """Return what the page shows of clients, modules, traffic and time."""
    failures = failure_table(run.records)
    return {
        "plans": plan_table(run.records, run.manifest),
        "are_types": set(run.plan_names.items()) <= set(DEVICES_OF_TYPES.items()),
        "participation": figures.participation(run),
        "spectra": spectra_view(run),
        "energy": figures.energy(run),
        "traffic": figures.traffic(run),
        "times": time_table(run.records),
        "time_figure": figures.stage_times(run),
        "failures": failures[:MAX_FAILURES],
        "num_failures": len(failures),
        "example_rank": max((rank for ranks in run.plan_ranks.values() for rank in ranks.values()), default=8),
        "heat_class": heat_class,
    }


def _virtual_time(run: RunFolder, others: Sequence[RunFolder], target: float | None) -> dict[str, Any]:
    """Return what the page shows of the virtual clock."""
    timed, chosen = timed_runs(run, others, target)
    return {
        "timed": timed,
        "target": chosen,
        "timed_notes": comparison_notes(run, others, target),
        "timed_figures": figures.timed_curves(timed, chosen),
        "devices": device_table(run.records, run.manifest),
    }


def _has(section: str, run: RunFolder, shown: Mapping[str, Any]) -> bool:
    """Return whether a section has anything in it."""
    charts = {"curves": shown["curves"][1:], "energy": shown["energy"]}
    if section in charts:
        return any(figure.chart for figure in charts[section])
    held = {
        "results": shown["summary"] or shown["curves"][0].chart,
        "categories": shown["categories"],
        "ranks": len(shown["ranks"]) > 1,
        "clients": shown["plans"],
        "traffic": shown["traffic"].chart,
        "time": shown["times"],
        "virtual-time": shown["timed"] or shown["timed_notes"],
        "use": run.adapters,
        "configuration": run.manifest or run.config,
    }
    return bool(held[section] if section in held else shown[section])


def _finished_models(run: RunFolder) -> list[str]:
    """Return the references that have been measured; answers of others may be those of an earlier run."""
    return [name for name in type(run.references).model_fields if getattr(run.references, name) is not None]


def _downloads(run: RunFolder) -> dict[str, Any]:
    """Return the files that the page offers, with their contents."""
    method = run.manifest.method if run.manifest else None
    tables = {
        "scores": score_rows(run.records, run.references, method),
        "rounds": round_rows(run.records),
        "tasks": task_rows(run.records, run.references),
    }
    files = {f"{name}.csv": csv_text(rows) for name, rows in tables.items() if rows} | {
        "report.json": json_text(tables)
    }
    titles = {f"{name}.csv": f"{name.capitalize()} (CSV)" for name in tables} | {"report.json": "All of it (JSON)"}
    return {"files": files, "downloads": [(name, titles[name]) for name in files]}


def _top(values: Sequence[float | None]) -> float:
    return max([10.0, *(10 * math.ceil(value / 10) for value in values if value is not None)])
