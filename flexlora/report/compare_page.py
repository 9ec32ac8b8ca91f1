"""Writes `report.html` into the folder of a comparison: one file that needs nothing else."""

from pathlib import Path

from flexlora.files import write_whole
from flexlora.report import study_figures
from flexlora.report.paired import DEFAULT_REFERENCE, ROWS_FILE, Row, StudyError, Summary, read_rows, summary
from flexlora.report.study_details import category_tables, cost_rows, measure_rows, rates_table
from flexlora.report.study_tables import MAIN_COLUMNS, main_rows
from flexlora.report.study_words import CONTROLS, draws_text, headline, interval_text, p_text, verdict_sentence
from flexlora.report.templates import environment
from flexlora.text import seconds_text

PAGE_FILE = "report.html"
CONFIG_FILE = "config.yaml"
TEMPLATE = "compare_page.html.j2"


def write_page(folder: Path | str, reference: str = DEFAULT_REFERENCE) -> Path:
    """Write `report.html` from the rows of a comparison, atomically, and return its path; works at any time.

    Args:
        folder: Holds `rows.jsonl`, and `config.yaml` if the page shall show it.
        reference: The arm that differences are to.

    Raises:
        StudyError: There are no rows, or a line of them is damaged.
    """
    folder = Path(folder)
    rows = read_rows(folder / ROWS_FILE)
    if not rows:
        raise StudyError(f"a comparison has finished runs in {ROWS_FILE}; {folder} has none yet; wait for the first")
    config = folder / CONFIG_FILE
    text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else None
    path = folder / PAGE_FILE
    # The name of a folder may hold bytes that are not text.
    write_whole(path, render(rows, folder.resolve().name, reference, text).encode(errors="replace"))
    return path


def render(rows: list[Row], name: str, reference: str = DEFAULT_REFERENCE, config: str | None = None) -> str:
    """Return the page of a comparison; see `write_page`."""
    found = summary(rows, reference)
    measure = found.headline
    groups = study_figures.line_arms(found)
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            name=name,
            summary=found,
            headline=headline(found),
            draws=study_figures.draws_words(found),
            facts=_facts(rows),
            measure=measure,
            controls=CONTROLS,
            columns=MAIN_COLUMNS,
            results=_results(found),
            forests=study_figures.forests(found, measure) if measure else [],
            curves=study_figures.curves(found, groups[0], "curve") if groups else [],
            more_curves=[(arms, study_figures.curves(found, arms, f"more-{n}")) for n, arms in enumerate(groups[1:])],
            rate_figures=study_figures.rate_figures(found, groups[0] if groups else list(found.arms)[:5]),
            rates=[(where, *rates_table(found, where)) for where in found.distributions],
            costs=[(where, cost_rows(found, where)) for where in found.distributions],
            categories=category_tables(found),
            config=config,
            p_text=p_text,
            interval_text=interval_text,
            draws_text=draws_text,
        )
    )


def _results(found: Summary) -> list[dict[str, object]]:
    """Return what the page shows of each distribution: a sentence, the main table, all measures."""
    if found.headline is None:
        return []
    shown = []
    for where in found.distributions:
        verdict = found.verdicts.get((found.headline.key, where))
        shown.append(
            {
                "where": where,
                "sentence": verdict_sentence(verdict, found.headline, False) if verdict else "",
                "rows": main_rows(found, found.headline, where),
                "measures": measure_rows(found, where),
            }
        )
    return [one for one in shown if one["rows"]]


def _facts(rows: list[Row]) -> list[tuple[str, str]]:
    """Return what the rows have in common, for the end of the page."""
    keys = [("Rounds", "rounds"), ("Clients", "clients"), ("Device", "device"), ("flexlora", "version")]
    # A run that serves several distributions has a row for each, and was made once.
    made = [row for row in rows if not row.get("copy_of")]
    facts = [("Runs", str(len(made))), ("Time of all runs", seconds_text(sum(row.get("seconds") or 0 for row in made)))]
    for title, key in keys:
        values = sorted({str(row[key]) for row in rows if row.get(key) is not None and row["arm"] != "base"})
        facts.append((title, ", ".join(values) or "–"))
    return facts
