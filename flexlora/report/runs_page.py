"""Writes one page that compares any runs: curves, scores, differences over seeds, and what their settings are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.files import making_parents
from flexlora.report.comparison import comparison_notes, disagreements, distinct_names, timed_runs
from flexlora.report.figures import Figure, timed_curves
from flexlora.report.line_chart import Series, line_chart
from flexlora.report.page import write_page_file
from flexlora.report.page_place import COMPARISON_GENERATOR, check_comparison_place
from flexlora.report.plain_rows import csv_text, json_text
from flexlora.report.run_differences import RunRow, comparison_in_words, run_rows, seed_rows
from flexlora.report.run_folder import ReportError, RunFolder, read_run
from flexlora.report.run_settings import arms_of, differing_settings
from flexlora.report.scales import NumberText
from flexlora.report.templates import environment
from flexlora.rounds.records import RoundRecord
from flexlora.text import number_text

MEASURES = (
    ("rouge_l", "ROUGE-L on unseen tasks", "0 to 100, higher is better", True, 1),
    ("exact_match", "Exact match on unseen tasks", "% of answers, higher is better", True, 1),
    ("loss", "Loss on unseen tasks", "nats per answer token, lower is better", False, 3),
    ("validation_loss", "Validation loss", "nats per answer token, lower is better", False, 3),
)


def write_runs_page(folders: Sequence[Path | str], out: Path | str, target: float | None = None) -> Path:
    """Write a page that compares runs, atomically, and return its path; it replaces such a page and nothing else.

    Args:
        folders: Of the runs; differences are to the first. A folder that is named twice counts once.
        out: The page.
        target: Unseen ROUGE-L whose virtual time is given, for runs with a virtual clock; see `write_report`.

    Raises:
        ReportError: There are not two runs, a folder holds no run, ``out`` is a run's own report or another file, or
            ``target`` is not a score.
        RecordsError: A file of a run is damaged.
    """
    out = Path(out)
    check_comparison_place(out)
    page = render_runs([read_run(Path(folder)) for folder in folders], target)
    with making_parents(out):
        write_page_file(out, page)
    return out


def render_runs(folders: Sequence[RunFolder], target: float | None = None) -> str:
    """Return the page that compares runs; see `write_runs_page`."""
    runs = _named(folders)
    if len(runs) < 2:
        raise ReportError(f"a comparison needs two different runs; got only {', '.join(runs)}")
    arms = arms_of(runs)
    rows, over_seeds = run_rows(runs, arms), seed_rows(runs, arms)
    first, *others = runs.values()
    timed, chosen = timed_runs(first, others, target) if _has_clock(runs) else ([], None)
    plain = [_plain(row) for row in rows]
    files = {"runs.csv": csv_text(plain), "comparison.json": json_text({"runs": plain})}
    shown: dict[str, Any] = {
        "generator": COMPARISON_GENERATOR,
        "headline": comparison_in_words(rows, over_seeds),
        "notes": _notes(runs, rows),
        "rows": rows,
        "arms": arms,
        "seeds": over_seeds,
        "figures": _figures(runs, rows),
        "settings": differing_settings(runs),
        "files": files,
        "downloads": [("runs.csv", "Runs (CSV)"), ("comparison.json", "Runs (JSON)")],
        "timed": timed,
        "target": chosen,
        "timed_notes": comparison_notes(first, others, target) if timed else [],
        "timed_figures": timed_curves(timed, chosen) if timed else [],
        "devices": [],
    }
    return environment().get_template("runs_page.html.j2").render(**shown)


def summary_of(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """Return what a comparison says in a few words, as plain values: ``headline``, ``notes`` and ``runs``."""
    runs = _named(folders)
    arms = arms_of(runs)
    rows = run_rows(runs, arms)
    words = comparison_in_words(rows, seed_rows(runs, arms))
    plain = json.loads(json_text({"runs": [_plain(row) for row in rows]}))
    return {"headline": words, "notes": _notes(runs, rows), **plain}


def _named(folders: Sequence[RunFolder]) -> dict[str, RunFolder]:
    by_path = {folder.path: folder for folder in folders}
    return dict(zip(distinct_names(list(by_path)), by_path.values(), strict=True))


def _has_clock(runs: Mapping[str, RunFolder]) -> bool:
    return any(record.virtual_clock_seconds is not None for run in runs.values() for record in run.records)


def _notes(runs: Mapping[str, RunFolder], rows: Sequence[RunRow]) -> list[str]:
    """Return what to know before comparing: what runs of a seed should share, falls, lost records, runs at work."""
    by_seed: dict[int | None, dict[str, RunFolder]] = {}
    for name, run in runs.items():
        by_seed.setdefault(run.manifest.seed if run.manifest else None, {})[name] = run
    notes = [note for group in by_seed.values() for note in disagreements(group)]
    for row in rows:
        if row.best and row.best.is_told:
            notes.append(row.best.in_words(row.name))
        run = runs[row.name]
        notes.extend(f"{row.name}: {sentence}" for sentence in run.gaps.in_words())
        wanted = run.manifest.num_rounds if run.manifest else None
        has_stopped = bool(run.records and run.records[-1].stopped)
        if wanted and row.num_rounds < wanted and not has_stopped and not run.gaps.missing:
            notes.append(f"{row.name} is not finished: {row.num_rounds} of {wanted} rounds.")
    return notes


def _figures(runs: Mapping[str, RunFolder], rows: Sequence[RunRow]) -> list[Figure]:
    figures = []
    for measure, title, unit, from_zero, digits in MEASURES:
        series = [
            Series(row.name, row.style, [(r.server_round, _value(r, measure)) for r in runs[row.name].records])
            for row in rows
        ]
        chart = line_chart(series, what=title, from_zero=from_zero, write=_writer(digits))
        figures.append(Figure(f"curve-{measure.replace('_', '-')}", title, unit, "Round 0 is the base model.", chart))
    return [figure for figure in figures if figure.chart]


def _writer(digits: int) -> NumberText:
    return lambda value: number_text(value, digits)


def _value(record: RoundRecord, measure: str) -> float | None:
    scores = record.evaluation
    if scores is None:
        return None
    return scores.validation_loss if measure == "validation_loss" else getattr(scores.unseen, measure)


def _plain(row: RunRow) -> dict[str, Any]:
    best, difference = row.best, row.to_first
    return {
        "run": row.name,
        "arm": row.arm,
        "method": row.method,
        "seed": row.seed,
        "num_rounds": row.num_rounds,
        "rouge_l": best.last_rouge_l if best else None,
        "difference_to_first": difference.value if difference else None,
        "difference_low": difference.low if difference else None,
        "difference_high": difference.high if difference else None,
        "best_rouge_l": best.rouge_l if best else None,
        "best_round": best.server_round if best else None,
        "lowest_validation_loss": row.validation[1] if row.validation else None,
        "round_of_lowest_validation_loss": row.validation[0] if row.validation else None,
        "bytes": row.num_bytes,
        "seconds": row.seconds,
    }
