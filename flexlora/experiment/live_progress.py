"""Shows the live progress of a run, or of scoring one, in a terminal, a notebook or a log.

It loads no torch, so that it is there before the seconds that loading torch takes.
"""

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import TaskID

from flexlora.experiment.stages import Scoring, Stage
from flexlora.experiment.time_left import TimeLeft
from flexlora.progress import quiet_clock, stage_bars
from flexlora.text import bytes_text, printable, seconds_text

if TYPE_CHECKING:
    from flexlora.rounds.loop_parts import RoundEvent
    from flexlora.rounds.records import RoundRecord

LONGEST_NAME = 24


class LiveProgress:
    """Shows each stage as it goes: round, cohort, loss, unseen score, bytes, answers scored, and the time left in all.

    Where the console is no terminal, no bar moves; stages, evaluations and failures are printed as lines, and so is how
    far it is, ever less often.
    """

    def __init__(self, console: Console, *, hidden: bool) -> None:
        self._console = console
        self._hidden = hidden
        self._bars = stage_bars(console, hidden=hidden)
        self._task = self._bars.add_task("starting", total=None, detail="")
        self._whole = self._bars.add_task("whole run", total=1.0, visible=False, detail="")
        self._scoring: TaskID | None = None
        self._scored = 0
        self._trainings_per_step = 1.0
        self._time = TimeLeft()
        self._is_due = quiet_clock(time.monotonic)
        self._trained = 0
        self._bytes = 0
        self._shown = ""
        self._unseen = ""

    def __enter__(self) -> "LiveProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, event: "RoundEvent | Stage | Scoring") -> None:
        """Take one event from the experiment or its round loop."""
        if self._hidden:
            return
        if isinstance(event, Stage):
            self._begin(event)
        elif isinstance(event, Scoring):
            self._score(event)
        else:
            self._take(event)
        self._show_whole()

    def _take(self, event: "RoundEvent") -> None:
        name = f"round {event.server_round}" if event.server_round else "base model"
        if event.kind == "cohort":
            self._time.turn_to("trainings")
            self._trained = 0
            self._update(name, f"0/{event.num_clients} clients  {self._status()}")
        elif event.kind == "client":
            self._time.add("trainings", self._trainings_per_step)
            self._bars.advance(self._task, 1)
            self._trained += 1
            self._say_client(event, name)
        elif event.kind == "evaluating":
            self._time.turn_to("answers")
            self._update(name, f"scoring  {self._status()}")
        elif event.kind == "done" and event.record is not None:
            self._finish_round(event.record, name)

    def _begin(self, stage: Stage) -> None:
        self._shown = self._unseen = ""
        self._bytes = 0
        self._hide_scoring()
        self._time.begin(stage.left, "trainings" if stage.num_steps else None)
        self._trainings_per_step = stage.trainings_per_step
        self._print(stage.title, style="bold cyan")
        for note in stage.notes:
            self._print(f"  {printable(note)}", style="yellow")
        self._bars.reset(self._task, total=stage.num_steps, completed=stage.completed, detail="", description="working")

    def _say_client(self, event: "RoundEvent", name: str) -> None:
        if event.client is None:
            return
        state = "" if event.client.outcome == "ok" else " failed"
        counted = f"{self._trained}/{event.num_clients} clients"
        self._update(name, f"{counted}  {self._status()}  {event.client.client_id[:LONGEST_NAME]}{state}")
        self._say(f"{name}: {counted} have trained")

    def _score(self, event: Scoring) -> None:
        if self._scoring is None:
            self._time.turn_to("answers")
            self._scoring = self._bars.add_task("scoring", total=event.num_answers, detail="")
            self._scored = 0
        self._time.add("answers", event.done - self._scored)
        self._scored = event.done
        words = f"{event.done:,}/{event.num_answers:,} answers, {event.subject}"
        self._bars.update(self._scoring, completed=event.done, total=event.num_answers, detail=words)
        self._say(f"scoring {event.subject}: {event.done:,} of {event.num_answers:,} answers")
        if event.done >= event.num_answers:
            self._hide_scoring()

    def _hide_scoring(self) -> None:
        if self._scoring is not None:
            self._bars.remove_task(self._scoring)
            self._scoring = None

    def _finish_round(self, record: "RoundRecord", name: str) -> None:
        self._bytes += record.up_bytes + record.down_bytes
        if record.train_loss is not None:
            self._shown = f"training loss {record.train_loss:.3f}"
        if record.evaluation is not None:
            self._unseen = f"unseen ROUGE-L {record.evaluation.unseen.rouge_l:.1f}"
            line = f"  {name}: {self._unseen}, exact match {record.evaluation.unseen.exact_match:.1f} %"
            self._print(line + (f", {self._shown}" if self._shown else ""))
        if record.num_failed:
            first = next(client for client in record.clients if client.outcome == "failed")
            self._print(
                f"  {name}: {record.num_failed} of {len(record.clients)} clients failed, "
                f"first {first.client_id}: {first.reason}",
                style="yellow",
            )
        self._update(name, self._status())

    def _show_whole(self) -> None:
        """Show how long the run has taken, and what is left of it with all references."""
        left = self._time.seconds_left()
        if left is None:
            return
        share = self._time.elapsed() / max(1e-9, self._time.elapsed() + left)
        detail = f"about {seconds_text(left)} left" if left >= 1 else "nearly done"
        self._bars.update(self._whole, completed=share, visible=True, detail=detail)

    def _say(self, what: str) -> None:
        """Print a line where no bar moves, if the last one is long enough ago."""
        if self._bars.disable and self._is_due():
            left = self._time.seconds_left()
            self._print(f"  {what}" + ("" if left is None else f"; about {seconds_text(left)} left in all"))

    def _print(self, line: str, style: str | None = None) -> None:
        self._is_due(printed=True)
        self._console.print(line, style=style, highlight=False, markup=False)

    def _status(self) -> str:
        return "  ".join(
            part for part in (self._shown, self._unseen, bytes_text(self._bytes) if self._bytes else "") if part
        )

    def _update(self, description: str, detail: str) -> None:
        self._bars.update(self._task, description=description, detail=detail)
