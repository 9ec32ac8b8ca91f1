"""Shows the live progress of a run in the terminal."""

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from flexlora.experiment.stages import Stage
from flexlora.progress import moving_bar
from flexlora.rounds.loop_parts import RoundEvent
from flexlora.rounds.records import RoundRecord
from flexlora.text import bytes_text


class LiveProgress:
    """Shows each stage as it goes: round, cohort, loss, unseen score, bytes and time left.

    Where the console is no terminal, evaluations and failures are printed as lines and there is no moving bar.
    """

    def __init__(self, console: Console, *, hidden: bool) -> None:
        self._console = console
        self._hidden = hidden
        self._progress = moving_bar(console, TextColumn("{task.fields[detail]}"), hidden=hidden)
        self._task = self._progress.add_task("starting", total=None, detail="")
        self._bytes = 0
        self._shown = ""
        self._unseen = ""

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
