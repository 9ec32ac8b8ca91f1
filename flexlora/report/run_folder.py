"""Reads what a run folder holds, as far as the run has got."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from flexlora.errors import FlexLoraError
from flexlora.report import participation
from flexlora.report.answer_file import ANSWERS_FILE, AnswerRecord, read_answers
from flexlora.report.plan_names import plan_names
from flexlora.report.record_gaps import RecordGaps, known_rounds, record_gaps
from flexlora.rounds.records import (
    MANIFEST_FILE,
    RECORDS_FILE,
    REFERENCES_FILE,
    ManifestRecord,
    ReferencesRecord,
    RoundRecord,
    read_manifest,
    read_references,
    recorded_lines,
)

CONFIG_FILE = "config.yaml"


class ReportError(FlexLoraError, ValueError):
    """A folder cannot be reported on, or not as asked."""


@dataclass(frozen=True)
class RunFolder:
    """What was found in a run folder; any of it may be missing while the run goes on.

    Attributes:
        path: Where it is, with nothing relative in it.
        adapters: Names of the folders with adapters, smallest rank first.
        adapter_bytes: Name of such a folder -> size of its files.
        answers: What models answered to unseen tasks.
        gaps: Rounds whose records are missing or changed.
    """

    path: Path
    records: Sequence[RoundRecord]
    references: ReferencesRecord
    manifest: ManifestRecord | None
    config: str | None
    adapters: Sequence[str]
    adapter_bytes: Mapping[str, int] = field(default_factory=dict)
    answers: Sequence[AnswerRecord] = ()
    gaps: RecordGaps = field(default_factory=RecordGaps)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name

    @cached_property
    def plan_ranks(self) -> dict[str, dict[str, int]]:
        """Plan name -> module path -> rank, smallest ranks first."""
        return participation.plan_ranks(self.records, self.manifest)

    @cached_property
    def plan_names(self) -> dict[str, str]:
        """Plan name -> what pages call it."""
        return plan_names(list(self.plan_ranks), self.records)

    def called(self, plan: str) -> str:
        """Return what pages call a plan."""
        return self.plan_names.get(plan, plan)

    @cached_property
    def plan_styles(self) -> dict[str, str]:
        """Plan name -> CSS class."""
        return {plan: f"p{1 + place % 6}" for place, plan in enumerate(self.plan_ranks)}


def check_run(run_folder: Path) -> None:
    """Raise unless a folder holds something that a run writes.

    Raises:
        ReportError: Naming what was looked for.
    """
    if not any((run_folder / name).exists() for name in (RECORDS_FILE, MANIFEST_FILE, CONFIG_FILE)):
        raise ReportError(
            f"a run folder holds {RECORDS_FILE}, {MANIFEST_FILE} or {CONFIG_FILE}; {run_folder} holds none of them; "
            "name the folder given to `flexlora run --out`"
        )


def check_target(target: float | None) -> None:
    """Raise unless a target is a ROUGE-L, or None.

    Raises:
        ReportError: Naming the range.
    """
    if target is not None and not 0 <= target <= 100:
        raise ReportError(f"--target must be a ROUGE-L between 0 and 100, as --target 30; got {target:g}")


def read_run(run_folder: Path) -> RunFolder:
    """Return what a run folder holds.

    Raises:
        ReportError: The folder holds nothing that a run writes.
        RecordsError: A file of the run is damaged.
    """
    check_run(run_folder)
    # Before the records: beside a live run they grow.
    known = known_rounds(run_folder)
    lines = list(recorded_lines(run_folder / RECORDS_FILE))
    config = run_folder / CONFIG_FILE
    adapters = [path for path in run_folder.glob("adapters/rank-*") if path.is_dir()]
    sizes = {path.name: sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in adapters}
    return RunFolder(
        path=run_folder.resolve(),
        records=[record for _, record in lines],
        references=read_references(run_folder / REFERENCES_FILE),
        manifest=read_manifest(run_folder / MANIFEST_FILE),
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else None,
        adapters=sorted(sizes, key=lambda name: (len(name), name)),
        adapter_bytes=sizes,
        answers=read_answers(run_folder / ANSWERS_FILE),
        gaps=record_gaps(known, lines),
    )
