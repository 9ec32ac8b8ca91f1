"""What the terminal shows: live progress of a run and the tables at its end."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

from flexlora.experiment.estimate import Plan
from flexlora.experiment.run import RunResult
from flexlora.experiment.stages import Stage
from flexlora.progress import moving_bar
from flexlora.report.comparison import comparison_notes, timed_runs
from flexlora.report.run_folder import read_run
from flexlora.report.score_tables import SUMMARY_COLUMNS, summary_cells, summary_table
from flexlora.report.virtual_time import VIRTUAL_COLUMNS, TimedRun, virtual_cells
from flexlora.rounds.loop_parts import RoundEvent
from flexlora.rounds.records import EvaluationRecord, RoundRecord
from flexlora.text import bytes_text, describe_ranks, number_text, seconds_text

WIDE_COLUMNS = 120


NARROW_COLUMNS = (SUMMARY_COLUMNS[0], "ROUGE-L", "exact match", "difference to base")


class LiveProgress:
    """Shows each stage as it goes: round, cohort, loss, unseen score, bytes and time left.

    Where the console is no terminal, evaluations and failures are printed as lines and there is no moving bar.
    """

    def __init__(self, console: Console, *, hidden: bool) -> None:
        self._console = console
        self._hidden = hidden
        self._progress = moving_bar(console, TextColumn("{task.fields[detail]}"), hidden=hidden)
        self._task = self._progress.add_task("starting", total=None, detail="")
        self._title = "training"
        self._bytes = 0
        self._shown = ""
        self._unseen = ""
        self._started = time.perf_counter()

    def __enter__(self) -> "LiveProgress":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: RoundEvent | Stage) -> None:
        """Take one event from the experiment or its round loop."""
        if self._hidden:
            return
        if isinstance(event, Stage):
            self._begin(event)
        elif event.kind == "cohort":
            self._update(f"round {event.server_round}", f"0/{event.num_clients} clients")
        elif event.kind == "client":
            self._progress.advance(self._task, 1)
            if event.client is None:
                return
            state = "" if event.client.outcome == "ok" else " [red]failed[/]"
            name = escape(event.client.client_id[:24])
            self._update(f"round {event.server_round}", f"{name}{state} {self._status()}")
        elif event.kind == "evaluating":
            self._update(f"round {event.server_round}", f"scoring {self._status()}")
        elif event.kind == "done" and event.record is not None:
            self._finish_round(event.record)

    def _begin(self, stage: Stage) -> None:
        self._title = stage.title
        self._shown = self._unseen = ""
        self._bytes = 0
        self._console.print(stage.title, style="bold cyan", highlight=False, markup=False)
        for note in stage.notes:
            self._console.print(f"  {note}", style="yellow", highlight=False, markup=False)
        self._progress.reset(self._task, total=stage.num_steps, completed=stage.completed, detail="", description="")

    def _finish_round(self, record: RoundRecord) -> None:
        self._bytes += record.up_bytes + record.down_bytes
        if record.train_loss is not None:
            self._shown = f"loss {record.train_loss:.3f}"
        if record.evaluation is not None:
            self._unseen = f"unseen ROUGE-L {record.evaluation.unseen.rouge_l:.1f}"
            name = f"round {record.server_round}" if record.server_round else "base model"
            line = f"  {name}: {self._unseen}, exact match {record.evaluation.unseen.exact_match:.1f} %"
            line += f", {self._shown}" if self._shown else ""
            self._console.print(line, highlight=False)
        if record.num_failed:
            first = next(client for client in record.clients if client.outcome == "failed")
            self._console.print(
                f"  round {record.server_round}: {record.num_failed} of {len(record.clients)} clients failed, "
                f"first {first.client_id}: {first.reason}",
                style="yellow",
                highlight=False,
                markup=False,
            )
        self._update(f"round {record.server_round}", self._status())

    def _status(self) -> str:
        return "  ".join(part for part in (self._shown, self._unseen, bytes_text(self._bytes)) if part)

    def _update(self, description: str, detail: str) -> None:
        self._progress.update(self._task, description=description, detail=detail)


def print_summary(console: Console, result: RunResult) -> None:
    """Print the final table of a run and where its artefacts are."""
    table = Table(title=f"Unseen tasks after {result.server_round} rounds", title_justify="left", header_style="bold")
    wide = console.width >= WIDE_COLUMNS
    shown = [index for index, name in enumerate(SUMMARY_COLUMNS) if wide or name in NARROW_COLUMNS]
    for index in shown:
        table.add_column(SUMMARY_COLUMNS[index], justify="left" if index == 0 else "right", no_wrap=index > 0)
    rows = summary_table(result.records, result.references, result.method)
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


def print_plan(console: Console, plan: Plan) -> None:
    """Print what a run will do and cost."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in plan.facts:
        facts.add_row(Text(name, style="bold"), Text(value))
    console.print(facts)
    table = Table(title="One client, one round", title_justify="left", header_style="bold")
    for name in ("type", "ranks", "clients", "trained", "memory", "down", "up", "time"):
        is_text = name in ("type", "ranks")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "ranks")
    for row in plan.types:
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
    if plan.devices:
        _print_devices(console, plan)
    for line in plan.notes:
        console.print(line, highlight=False, markup=False)


def _print_devices(console: Console, plan: Plan) -> None:
    table = Table(title="One client, one round, on its device", title_justify="left", header_style="bold")
    parts = ("down", "compute", "up") if console.width >= WIDE_COLUMNS else ()
    for name in ("device", "clients", "memory", "it has", *parts, "time", "traffic", "limited by"):
        is_text = name in ("device", "limited by")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in plan.devices:
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
    for device, types in {row.device: row.fixed_types for row in plan.devices if row.fixed_types}.items():
        verdicts = [f"{name} {'does not fit: ' + why if why else 'fits'}" for name, why in types.items()]
        console.print(f"Of clients.types on {device}: {'; '.join(verdicts)}.", highlight=False, markup=False)


def print_virtual_time(
    console: Console, runs: Sequence[TimedRun], target: float | None, notes: Sequence[str] = ()
) -> None:
    """Print how runs went on the virtual clock, if any had one, and what to know about them."""
    if runs:
        console.print(_virtual_table(console, runs, target))
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False)


def _virtual_table(console: Console, runs: Sequence[TimedRun], target: float | None) -> Table:
    table = Table(title="On the virtual clock (ROUGE-L on unseen tasks)", title_justify="left", header_style="bold")
    names = (*VIRTUAL_COLUMNS, "to target" if target is None else f"to {number_text(target)}")
    wide = console.width >= WIDE_COLUMNS
    shown = [index for index, name in enumerate(names) if wide or name not in ("rounds", "sent")]
    for index in shown:
        table.add_column(names[index], justify="left" if index < 2 else "right", no_wrap=index > 0)
    for run in runs:
        cells = virtual_cells(run, target)
        table.add_row(*(Text(cells[index]) for index in shown))
    return table


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
