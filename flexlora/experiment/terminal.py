"""Prints the tables at the end of a command: results, estimates, scores."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexlora.experiment.estimate import Estimate
from flexlora.experiment.result import RunResult
from flexlora.report.comparison import comparison_notes, timed_runs
from flexlora.report.run_folder import read_run
from flexlora.report.score_tables import SUMMARY_COLUMNS, summary_cells, summary_table
from flexlora.report.shown_answers import drawn_answers
from flexlora.report.terminal import WIDE_COLUMNS, print_answers, print_virtual_time
from flexlora.report.whole_table import WholeTable
from flexlora.rounds.records import EvaluationRecord, ScoreRecord
from flexlora.text import bytes_text, count_text, describe_ranks, number_text, printable, seconds_text, signed_text

MOST_CATEGORIES = 10
"""Categories that the scores of a run show."""

NARROW_COLUMNS = (SUMMARY_COLUMNS[0], "ROUGE-L", "exact match", "difference to base")


def print_summary(console: Console, result: RunResult) -> None:
    """Print the final table of a run and where its artefacts are."""
    rows = [summary_cells(row) for row in summary_table(result.rounds, result.references, result.method)]
    wide = console.width >= WIDE_COLUMNS
    shown = [place for place, name in enumerate(SUMMARY_COLUMNS) if wide or name in NARROW_COLUMNS]
    table = WholeTable(
        [SUMMARY_COLUMNS[place] for place in shown],
        [[cells[place] for place in shown] for cells in rows],
        title=f"Unseen tasks after {count_text(result.server_round, 'round')}",
        styles={len(rows) - 1: "bold green"},
    )
    console.print(table)
    run = read_run(result.folder)
    print_virtual_time(console, *timed_runs(run), comparison_notes(run))
    print_answers(console, *drawn_answers(run.answers))
    if result.stopped:
        console.print(f"Stopped early: {result.stopped}", highlight=False, markup=False)
    lines = [f"Report   {result.report}"]
    lines += [f"Adapters {result.folder / 'adapters'} (standard PEFT folders)"] if result.has_progress else []
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_estimate(console: Console, estimate: Estimate) -> None:
    """Print what a run will do and cost."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column()
    facts.add_column(overflow="fold")  # A path is never cut.
    for name, value in estimate.facts:
        facts.add_row(Text(name, style="bold"), Text(value))
    console.print(facts)
    rows = [
        (
            row.name,
            describe_ranks(row.ranks),
            f"{row.num_clients:,}",
            f"{row.cost.num_trainable:,}",
            bytes_text(row.cost.memory_bytes),
            bytes_text(row.down_bytes),
            bytes_text(row.cost.up_bytes),
            seconds_text(row.cost.train_seconds),
        )
        for row in estimate.types
    ]
    headers = ("type", "ranks", "clients", "trained", "memory", "down", "up", "time")
    console.print(WholeTable(headers, rows, title="One client, one round", texts=("ranks",)))
    if estimate.devices:
        _print_devices(console, estimate)
    for line in estimate.notes:
        console.print(printable(line), highlight=False, markup=False)


def _print_devices(console: Console, estimate: Estimate) -> None:
    parts = ("down", "compute", "up") if console.width >= WIDE_COLUMNS else ()
    rows = []
    for row in estimate.devices:
        cost = row.cost
        times = (cost.download_seconds, cost.compute_seconds, cost.upload_seconds) if parts else ()
        rows.append(
            (
                row.device if row.plan in ("", row.device) else f"{row.device}, {row.plan}",
                f"{row.num_clients:,}",
                bytes_text(cost.memory_bytes),
                bytes_text(row.memory_bytes),
                *(seconds_text(seconds) for seconds in times),
                seconds_text(cost.seconds),
                bytes_text(cost.down_bytes + cost.up_bytes),
                row.limited_by or "nothing",
            )
        )
    headers = ("device", "clients", "memory", "it has", *parts, "time", "traffic", "limited by")
    console.print(WholeTable(headers, rows, title="One client, one round, on its device", texts=("limited by",)))
    for device, types in {row.device: row.fixed_types for row in estimate.devices if row.fixed_types}.items():
        verdicts = [f"{name} does not fit: {why}" if why else f"{name} fits" for name, why in types.items()]
        line = f"Of clients.types on {device}: {'; '.join(verdicts)}."
        console.print(printable(line), highlight=False, markup=False)


def print_evaluation(
    console: Console, scores: Mapping[str, EvaluationRecord], *, most_categories: int = MOST_CATEGORIES
) -> None:
    """Print models side by side: all unseen tasks by three measures, then the categories that changed most.

    Args:
        scores: Model -> its scores; the first is what the last is compared with.
        most_categories: How many categories are shown; the others are folded into one line.
    """
    names = list(scores)
    headers = ("unseen tasks", *names, *(("difference",) if len(names) > 1 else ()))
    last = scores[names[-1]].unseen
    measures = ("ROUGE-L", "exact match", "loss (nats)")
    parts = (("by examples", "unseen"), ("by tasks", "unseen_unweighted"))
    rows = [
        _score_cells(f"{measure}, {title}", measure, [getattr(scores[name], part) for name in names])
        for measure in measures
        for title, part in parts
    ]
    tasks = f"{count_text(last.num_tasks, 'task')}, {count_text(last.num_examples, 'example')}"
    console.print(WholeTable(headers, rows, title=tasks, styles={0: "bold"}))
    _print_categories(console, scores, headers, most_categories)


def _print_categories(
    console: Console, scores: Mapping[str, EvaluationRecord], headers: Sequence[str], most: int
) -> None:
    first, last = (list(scores.values())[place].categories for place in (0, -1))
    order = sorted(last, key=lambda name: (-abs(last[name].rouge_l - first[name].rouge_l), name))
    folded = order[most:] if len(order) > most + 1 else []
    shown = [name for name in order if name not in folded]
    rows = [
        _score_cells(
            f"{name} ({last[name].num_tasks})", "ROUGE-L", [record.categories[name] for record in scores.values()]
        )
        for name in sorted(shown, key=lambda name: (first[name].rouge_l - last[name].rouge_l, name))
    ]
    if rows:
        title = "ROUGE-L by category (tasks)" + (", those that changed most" if folded else "")
        console.print(WholeTable(("category", *headers[1:]), rows, title=title))
    if folded:
        least = abs(last[folded[0]].rouge_l - first[folded[0]].rouge_l)
        note = f"{len(folded)} more categories changed by {number_text(least)} at most; --categories shows them."
        console.print(printable(note), highlight=False, markup=False)


def _score_cells(title: str, measure: str, records: Sequence[ScoreRecord]) -> list[str]:
    field, digits, unit = {"ROUGE-L": ("rouge_l", 1, ""), "exact match": ("exact_match", 1, " %")}.get(
        measure, ("loss", 3, "")
    )
    values = [getattr(record, field) for record in records]
    cells = [number_text(value, digits, unit=unit) for value in values]
    return [title, *cells, *([signed_text(values[-1] - values[0], digits)] if len(values) > 1 else [])]
