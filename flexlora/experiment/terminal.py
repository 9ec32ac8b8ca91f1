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
from flexlora.report.terminal import WIDE_COLUMNS, print_virtual_time
from flexlora.rounds.records import EvaluationRecord
from flexlora.text import bytes_text, count_text, describe_ranks, number_text, seconds_text

NARROW_COLUMNS = (SUMMARY_COLUMNS[0], "ROUGE-L", "exact match", "difference to base")


def print_summary(console: Console, result: RunResult) -> None:
    """Print the final table of a run and where its artefacts are."""
    table = Table(
        title=f"Unseen tasks after {count_text(result.server_round, 'round')}",
        title_justify="left",
        header_style="bold",
    )
    wide = console.width >= WIDE_COLUMNS
    shown = [index for index, name in enumerate(SUMMARY_COLUMNS) if wide or name in NARROW_COLUMNS]
    for index in shown:
        table.add_column(SUMMARY_COLUMNS[index], justify="left" if index == 0 else "right", no_wrap=index > 0)
    rows = summary_table(result.rounds, result.references, result.method)
    for row in rows:
        cells = summary_cells(row)
        table.add_row(*(Text(cells[index]) for index in shown), style="bold green" if row is rows[-1] else None)
    console.print(table)
    run = read_run(result.folder)
    print_virtual_time(console, *timed_runs(run), comparison_notes(run))
    if result.stopped:
        console.print(f"Stopped early: {result.stopped}", highlight=False, markup=False)
    lines = [f"Report   {result.report}"]
    lines += [f"Adapters {result.folder / 'adapters'} (standard PEFT folders)"] if result.has_progress else []
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def print_estimate(console: Console, estimate: Estimate) -> None:
    """Print what a run will do and cost."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in estimate.facts:
        facts.add_row(Text(name, style="bold"), Text(value))
    console.print(facts)
    table = Table(title="One client, one round", title_justify="left", header_style="bold")
    for name in ("type", "ranks", "clients", "trained", "memory", "down", "up", "time"):
        is_text = name in ("type", "ranks")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "ranks")
    for row in estimate.types:
        table.add_row(
            Text(row.name),
            Text(describe_ranks(row.ranks)),
            f"{row.num_clients}",
            f"{row.cost.num_trainable:,}",
            bytes_text(row.cost.memory_bytes),
            bytes_text(row.down_bytes),
            bytes_text(row.cost.transfer_bytes),
            seconds_text(row.cost.train_seconds),
        )
    console.print(table)
    if estimate.devices:
        _print_devices(console, estimate)
    for line in estimate.notes:
        console.print(line, highlight=False, markup=False)


def _print_devices(console: Console, estimate: Estimate) -> None:
    table = Table(title="One client, one round, on its device", title_justify="left", header_style="bold")
    parts = ("down", "compute", "up") if console.width >= WIDE_COLUMNS else ()
    for name in ("device", "clients", "memory", "it has", *parts, "time", "traffic", "limited by"):
        is_text = name in ("device", "limited by")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in estimate.devices:
        cost = row.cost
        times = (cost.download_seconds, cost.compute_seconds, cost.upload_seconds) if parts else ()
        table.add_row(
            Text(row.device if row.plan in ("", row.device) else f"{row.device}, {row.plan}"),
            f"{row.num_clients}",
            bytes_text(cost.memory_bytes),
            bytes_text(row.memory_bytes),
            *(seconds_text(seconds) for seconds in times),
            seconds_text(cost.seconds),
            bytes_text(cost.down_bytes + cost.up_bytes),
            row.limited_by or "nothing",
        )
    console.print(table)
    for device, types in {row.device: row.fixed_types for row in estimate.devices if row.fixed_types}.items():
        verdicts = [f"{name} does not fit: {why}" if why else f"{name} fits" for name, why in types.items()]
        console.print(f"Of clients.types on {device}: {'; '.join(verdicts)}.", highlight=False, markup=False)


def print_evaluation(console: Console, scores: Mapping[str, EvaluationRecord]) -> None:
    """Print models side by side: all unseen tasks, then each category."""
    names: Sequence[str] = list(scores)
    table = Table(header_style="bold")
    table.add_column("unseen tasks")
    table.add_column("tasks", justify="right")
    table.add_column("examples", justify="right")
    for name in names:
        table.add_column(f"{name}\nROUGE-L", justify="right")
    last = scores[names[-1]]
    for title, pick in (("all, by examples", "unseen"), ("all, by tasks", "unseen_unweighted")):
        record = getattr(last, pick)
        cells = [number_text(getattr(scores[name], pick).rouge_l) for name in names]
        table.add_row(title, f"{record.num_tasks}", f"{record.num_examples}", *cells, style="bold")
    for category, record in last.categories.items():
        cells = [number_text(scores[name].categories[category].rouge_l) for name in names]
        table.add_row(Text(category), f"{record.num_tasks}", f"{record.num_examples}", *cells)
    console.print(table)
