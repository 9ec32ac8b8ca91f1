"""Holds what a run left behind: its scores, records, clients and adapter, for programs and notebooks."""

import html
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from flexlora.experiment.best_round import WhichRound
from flexlora.experiment.export import adapter_of_run, export_run
from flexlora.experiment.result_rows import client_rows
from flexlora.experiment.run_folder import ADAPTERS_FOLDER, read_run_config
from flexlora.lora.factors import AdapterState
from flexlora.report.page import REPORT_FILE, write_report
from flexlora.report.plain_rows import Row, round_rows, score_rows
from flexlora.report.scores import last_evaluated
from flexlora.rounds.loop_parts import Outcome
from flexlora.rounds.records import (
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    EvaluationRecord,
    ReferencesRecord,
    RoundRecord,
    read_manifest,
    read_records,
    read_references,
)
from flexlora.text import number_text, signed_text

if TYPE_CHECKING:
    from pandas import DataFrame

NO_UPDATE = "no client ever sent a usable update"


@dataclass(frozen=True, repr=False)
class RunResult:
    """What a run left behind.

    Attributes:
        folder: The folder of the run.
        report: The report in it.
        method: The name of the method.
        server_round: The last round.
        stopped: Why it ended early, or None.
        has_progress: Whether it learned from any client and has adapters.
        rounds: One record per round, from round 0, the base model alone.
        references: What the run is compared with.
    """

    folder: Path
    report: Path
    method: str
    server_round: int
    stopped: str | None
    has_progress: bool
    rounds: Sequence[RoundRecord]
    references: ReferencesRecord

    @staticmethod
    def of(
        folder: Path, method: str, outcome: Outcome, rounds: Sequence[RoundRecord], references: ReferencesRecord
    ) -> "RunResult":
        """Return the result of a run that has just ended, after writing its report."""
        return RunResult(
            folder=folder,
            report=write_report(folder),
            method=method,
            server_round=outcome.server_round,
            stopped=outcome.stopped,
            has_progress=outcome.has_progress,
            rounds=rounds,
            references=references,
        )

    def scores(self) -> "DataFrame | list[Row]":
        """Return the unseen-task scores of the base model, the references and the federated model, one row each.

        ROUGE-L and exact match are in 0 to 100, ``loss`` in nats per token. Like ``records`` and ``clients``, a pandas
        frame where pandas is installed, else a list of dicts.
        """
        return _frame(score_rows(self.rounds, self.references, self.method))

    def records(self) -> "DataFrame | list[Row]":
        """Return one row per round: how clients fared, the loss, the bytes, and scores where it was evaluated."""
        return _frame(round_rows(self.rounds))

    def clients(self) -> "DataFrame | list[Row]":
        """Return one row per round and client that took part: its plan, ranks, bytes, loss, and why it failed."""
        return _frame(client_rows(self.rounds))

    def adapter(self, rank: int | None = None, *, which: WhichRound = "last") -> AdapterState:
        """Return the global adapter: module path -> factors.

        Args:
            rank: In 1 to the server's rank; None takes all of it.
            which: The last round, or the best: that of the lowest validation loss.

        Raises:
            ExperimentError: If no round is finished or the rank is out of range.
        """
        return adapter_of_run(self.folder, rank, which)

    def export(
        self, folder: Path | str, *, rank: int | None = None, merged: bool = False, which: WhichRound = "last"
    ) -> Path:
        """Write the global adapter as a standard PEFT folder, or merged into the whole model, and return that folder.

        Args:
            folder: Where to write; must not exist.
            rank: In 1 to the server's rank; None takes all of it.
            merged: Write base and adapter as one model, with the tokenizer.
            which: The last round, or the best: that of the lowest validation loss.

        Raises:
            ExperimentError: If no round is finished, the rank is out of range, or ``folder`` exists.
        """
        export_run(self.folder, folder, rank=rank, merged=merged, which=which)
        return Path(folder)

    def adapters(self) -> dict[int, Path]:
        """Return rank -> the PEFT folder of the global adapter at this rank, smallest first; none before the end."""
        found = (self.folder / ADAPTERS_FOLDER).glob("rank-*")
        ranks = {int(folder.name.removeprefix("rank-")): folder for folder in found}
        return dict(sorted(ranks.items()))

    def summary(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        last = last_evaluated(self.rounds)
        local = self.references.local_only

        def unseen(evaluation: EvaluationRecord | None) -> dict[str, Any] | None:
            """Return the score on the unseen tasks as plain values."""
            return json.loads(evaluation.unseen.model_dump_json()) if evaluation else None

        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "server_round": self.server_round,
            "stopped": self.stopped,
            "has_progress": self.has_progress,
            "adapters": {str(rank): str(folder) for rank, folder in self.adapters().items()},
            "unseen": {
                "base": unseen(self.references.base),
                "federated": unseen(last.evaluation if last else None),
                **{
                    name: unseen(run.final if run else None)
                    for name, run in (
                        ("fedit_smallest_rank", self.references.fedit_smallest_rank),
                        ("large_clients_alone", self.references.large_clients_alone),
                        ("fedit_largest_rank", self.references.fedit_largest_rank),
                    )
                },
                "local_only": json.loads(local.unseen.model_dump_json()) if local and local.unseen else None,
            },
        }

    def __repr__(self) -> str:
        lines = [f"RunResult({self.folder}: {self._in_words()})"]
        if self.stopped or not self.has_progress:
            lines.append(self._warning())
        return "\n".join(lines)

    def _in_words(self) -> str:
        words = f"{self.method}, {self.server_round} round{'' if self.server_round == 1 else 's'}"
        by_name = {row["model"]: row for row in score_rows(self.rounds, self.references)}
        if (federated := by_name.get("Federated")) is not None:
            words += f", unseen ROUGE-L {number_text(federated['rouge_l'])}"
            if (base := by_name.get("Base model")) is not None:
                words += f", base model {number_text(base['rouge_l'])}"
        return words

    def _warning(self) -> str:
        return f"Stopped early: {self.stopped}" if self.has_progress else f"No progress: {self.stopped or NO_UPDATE}"

    def _repr_html_(self) -> str:
        """Return a small table and a link to the report, for notebooks."""
        head = "".join(f"<th>{name}</th>" for name in ("unseen tasks", "ROUGE-L", "exact match", "difference to base"))
        body = ""
        for row in score_rows(self.rounds, self.references, self.method):
            name = f"{row['model']}, {row['detail']}"
            numbers = (
                number_text(row["rouge_l"]),
                number_text(row["exact_match"], unit=" %"),
                signed_text(row["difference_to_base"]),
            )
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *numbers))
            body += f"<tr>{cells}</tr>"
        warning = self._warning() if self.stopped or not self.has_progress else ""
        link = f'<a href="{html.escape(quote(str(self.report)))}" target="_blank">{html.escape(str(self.report))}</a>'
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
            f"<p>{html.escape(warning)}{'<br>' if warning else ''}Report: {link}</p>"
        )


def open_run(folder: Path | str) -> RunResult:
    """Return what the run in a folder has left behind so far; it may be still running, or have been interrupted.

    Raises:
        ExperimentError: If ``folder`` is not the folder of a run.
        RecordsError: If a file of the run is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST_FILE)
    # The configuration names a method of the user's own, which may not be registered here.
    method = read_run_config(folder).method.name if manifest is None else manifest.method
    rounds = read_records(folder / RECORDS_FILE)
    return RunResult(
        folder=folder,
        report=folder / REPORT_FILE,
        method=method,
        server_round=rounds[-1].server_round if rounds else 0,
        stopped=rounds[-1].stopped if rounds else None,
        has_progress=any((folder / ADAPTERS_FOLDER).glob("rank-*")),
        rounds=rounds,
        references=read_references(folder / REFERENCES_FILE),
    )


def _frame(rows: list[Row]) -> "DataFrame | list[Row]":
    if importlib.util.find_spec("pandas") is None:
        return rows
    import pandas

    return pandas.DataFrame(rows)
