"""Defines, writes and reads the records of a run: one JSON line per round, the references and the manifest.

`records.jsonl` holds one `RoundRecord` per line, `references.json` one `ReferencesRecord`, `manifest.json` one
`ManifestRecord`. Every file is strict JSON: NaN and the infinities travel as the strings ``"NaN"``, ``"Infinity"``
and ``"-Infinity"`` and come back as floats. Wall-clock times appear only in fields called ``seconds`` and in
``ManifestRecord.started``, so that two runs can be compared with those left out. References and manifest end in a
``digest`` of themselves (see ``flexlora.seal``); the digests of the lines of `records.jsonl` are in the checkpoints.
"""

import codecs
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flexlora.errors import FlexLoraError
from flexlora.files import sync, write_whole
from flexlora.seal import SealError, sealed, unsealed
from flexlora.text import printable

log = logging.getLogger(__name__)

RECORDS_FILE = "records.jsonl"


REFERENCES_FILE = "references.json"


MANIFEST_FILE = "manifest.json"


CHECKPOINTS_FOLDER = "checkpoints"


REFERENCES_FOLDER = "references"


class RecordsError(FlexLoraError, ValueError):
    """A record file cannot be read as what it should be."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


RecordT = TypeVar("RecordT", bound=_Record)


class ScoreRecord(_Record):
    """Quality of one model on one set of examples."""

    rouge_l: float = Field(description="ROUGE-L F-measure of generated text, 0 to 100")
    exact_match: float = Field(description="Share of generated answers equal to a reference, 0 to 100")
    loss: float = Field(description="Cross-entropy in nats per answer token")
    num_examples: int = Field(ge=0)
    num_tasks: int = Field(ge=0)


class TaskScoreRecord(_Record):
    """Quality of one model on one task, for comparing two models task by task."""

    rouge_l: float = Field(description="ROUGE-L F-measure of generated text, 0 to 100")
    num_examples: int = Field(ge=0)
    category: str = ""


class GroupClientRecord(_Record):
    """One client of a rank group on its own test data."""

    client_id: str
    rouge_l: float = Field(description="The global adapter, cut to its ranks, 0 to 100")
    base_rouge_l: float = Field(description="The base model alone, there")
    num_examples: int = Field(ge=0)


class RankGroupRecord(_Record):
    """How the global adapter, cut to the ranks of one plan, serves the clients of that plan."""

    ranks: dict[str, int] = Field(description="Module path -> rank")
    num_clients: int = Field(ge=0, description="Clients whose own test data were used")
    unseen: ScoreRecord | None = Field(default=None, description="Unseen tasks, adapter truncated to these ranks")
    own: ScoreRecord | None = Field(default=None, description="These clients' own test data, same adapter")
    base_own: ScoreRecord | None = Field(default=None, description="The base model alone, there")
    tasks: dict[str, TaskScoreRecord] = Field(default={}, description="Unseen task -> its score, same adapter")
    clients: list[GroupClientRecord] = Field(default=[], description="Client by client, own test data")


class EvaluationRecord(_Record):
    """One evaluation of one model."""

    unseen: ScoreRecord = Field(description="Unseen tasks, weighted by examples")
    unseen_unweighted: ScoreRecord = Field(description="Unseen tasks, plain mean over tasks")
    categories: dict[str, ScoreRecord] = Field(default={}, description="Category of unseen tasks -> its score")
    tasks: dict[str, TaskScoreRecord] = Field(default={}, description="Unseen task -> its score")
    validation_loss: float | None = Field(
        default=None, description="Nats per answer token on the fixed set that early stopping watches"
    )
    rank_groups: dict[str, RankGroupRecord] = Field(default={}, description="Plan name -> its group")


class ClientRecord(_Record):
    """One sampled client in one round."""

    client_id: str
    plan: str = Field(description="Name of its rank plan")
    ranks: dict[str, int] = Field(description="Module path -> rank it trained")
    num_examples: int = Field(ge=0)
    up_bytes: int = Field(default=0, ge=0)
    down_bytes: int = Field(default=0, ge=0)
    outcome: Literal["ok", "failed"]
    stage: str | None = Field(default=None, description="Where it failed; null when it did not")
    reason: str | None = Field(default=None, description="Why it failed; null when it did not")
    loss: float | None = Field(default=None, description="Mean training loss over its steps, nats per token")
    steps: int | None = Field(default=None, description="Optimiser steps it took")
    device: str | None = Field(default=None, description="Its simulated device; null when none are")
    virtual_seconds: float | None = Field(default=None, description="From being sent off to its arrival or failure")
    staleness: int | None = Field(default=None, description="Server steps between the model it took and its update")


class SpectrumRecord(_Record):
    """Singular values of the global change of one module."""

    singular_values: list[float] = Field(description="Descending, scaling included")
    tail: float = Field(default=0.0, description="Frobenius norm of what the listed values leave out")


class PhaseRecord(_Record):
    """One phase of a secure sum, over all clients."""

    kind: str
    num_asked: int = Field(ge=0)
    num_answered: int = Field(ge=0, description="Clients whose answer could be used")
    down_bytes: int = Field(default=0, ge=0)
    up_bytes: int = Field(default=0, ge=0)


class SecureSumRecord(_Record):
    """The secure sum of one round."""

    phases: list[PhaseRecord] = []
    num_summed: int = Field(default=0, ge=0, description="Clients whose numbers are in the sum")
    num_clipped: int = Field(default=0, ge=0, description="Numbers beyond their public bound, over all clients")
    sketch_error: float | None = Field(
        default=None, description="Estimated relative error of the sketched products; null where factors are summed"
    )
    train_loss: float | None = Field(default=None, description="Mean over the examples of those that are summed")


class PrivacyRecord(_Record):
    """What a round with differential privacy of clients did; for the server's eyes, the norms are not noised."""

    epsilon: float = Field(ge=0, description="Spent so far, this round included")
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(gt=0, description="Of the round, as it is accounted for")
    clip: float = Field(gt=0, description="Largest joint norm of a client's change in this round")
    num_clipped: int = Field(default=0, ge=0, description="Clients whose change was larger")
    median_norm: float | None = Field(default=None, description="Of the changes before clipping; null without clients")
    num_noised: int = Field(ge=0, description="Entries that got noise, of the deviation below")
    noise_deviation: float = Field(ge=0, description="Standard deviation of the noise on an entry of the mean")


class RobustRecord(_Record):
    """How far the clients of a round were believed."""

    rule: str
    shares: dict[str, float] = Field(description="Client id -> what its change was multiplied by, 0 to 1")


class RoundRecord(_Record):
    """One line of `records.jsonl`. Round 0 is the base model before training and has no clients."""

    server_round: int = Field(ge=0)
    learning_rate: float | None = None
    clients: list[ClientRecord] = []
    up_bytes: int = Field(default=0, ge=0, description="Sum over the clients of this round")
    down_bytes: int = Field(default=0, ge=0, description="Sum over the clients of this round")
    num_ok: int = Field(default=0, ge=0)
    num_failed: int = Field(default=0, ge=0)
    train_loss: float | None = Field(default=None, description="Mean over surviving clients, weighted by examples")
    spectra: dict[str, SpectrumRecord] = Field(default={}, description="Module path -> spectrum after the round")
    energy_kept: dict[str, float] = Field(
        default={},
        description="Plan name -> share (0 to 1) of the squared singular values, over all modules, inside its ranks",
    )
    energy_above_smallest: float | None = Field(
        default=None, description="Share (0 to 1) of the squared singular values above the smallest plan's ranks"
    )
    secure_sum: SecureSumRecord | None = Field(default=None, description="Null where updates travel one by one")
    robust: RobustRecord | None = Field(default=None, description="Null without a robust rule")
    privacy: PrivacyRecord | None = Field(default=None, description="Null without differential privacy")
    evaluation: EvaluationRecord | None = None
    note: str | None = Field(default=None, description="Anything unusual about the round, for a person")
    stopped: str | None = Field(default=None, description="Why the run ends here, if it ends early")
    seconds: dict[str, float] = Field(
        default={}, description="Stage (broadcast, train, aggregate, evaluate, checkpoint, total) -> wall time"
    )
    virtual_seconds: float | None = Field(default=None, description="What the round took on the virtual clock, if any")
    virtual_clock_seconds: float | None = Field(default=None, description="The virtual clock at the end of the round")


class LocalClientRecord(_Record):
    """One sampled client that also trained alone, for `evaluation.local_only_epochs` passes over its examples."""

    client_id: str
    plan: str
    own: ScoreRecord | None = Field(default=None, description="Its local-only adapter on its own test data")
    global_own: ScoreRecord | None = Field(default=None, description="The global adapter, cut to its ranks, there")
    base_own: ScoreRecord | None = Field(default=None, description="The base model alone, there")
    unseen: ScoreRecord | None = Field(default=None, description="Its local-only adapter on the unseen tasks")
    failure: str | None = Field(default=None, description="Why it has no scores; null when it has")


class LocalOnlyRecord(_Record):
    """Clients that train alone: what federating is compared with. Averages are over the listed clients."""

    clients: list[LocalClientRecord] = []
    own: ScoreRecord | None = None
    global_own: ScoreRecord | None = None
    base_own: ScoreRecord | None = None
    unseen: ScoreRecord | None = None
    tasks: dict[str, TaskScoreRecord] = Field(default={}, description="Unseen task -> mean over the clients")
    seconds: float | None = Field(default=None, description="Wall time")


class RoundScoreRecord(_Record):
    """The unseen-task score of a reference run after one of its rounds."""

    server_round: int = Field(ge=0)
    unseen: ScoreRecord
    virtual_clock_seconds: float | None = Field(default=None, description="Its virtual clock then, if any")


class ReferenceRunRecord(_Record):
    """A complete second run, kept short."""

    rank: str = Field(description="Its ranks in words, for example '2 in every module'")
    ranks: dict[str, int] = Field(default={}, description="Module path -> rank")
    num_clients: int | None = Field(default=None, ge=0, description="Clients that could be sampled; null is all")
    learning_rate: float | None = Field(default=None, description="Where its schedule starts, if not where the run's")
    evaluations: list[RoundScoreRecord] = []
    final: EvaluationRecord | None = None
    up_bytes: int = Field(default=0, ge=0)
    down_bytes: int = Field(default=0, ge=0)
    seconds: float | None = Field(default=None, description="Wall time of its rounds")


class ReferencesRecord(_Record):
    """What the run is compared with; each part is null until it has been measured."""

    base: EvaluationRecord | None = None
    local_only: LocalOnlyRecord | None = None
    fedit_smallest_rank: ReferenceRunRecord | None = None
    fedit_largest_rank: ReferenceRunRecord | None = None
    large_clients_alone: ReferenceRunRecord | None = None


class ManifestRecord(_Record):
    """What it takes to tell two runs apart or to repeat one."""

    flexlora_version: str
    packages: dict[str, str] = Field(default={}, description="Package -> version")
    python: str
    platform: str
    seed: int
    config_hash: str
    data_hashes: dict[str, str] = {}
    base_model: str
    num_parameters: int = Field(ge=0, description="Parameters of the base model")
    method: str
    num_clients: int = Field(ge=0)
    num_unseen_tasks: int = Field(ge=0)
    num_rounds: int | None = Field(default=None, description="Rounds asked for; null when unknown")
    cohort_size: int | None = None
    device: str | None = None
    num_threads: int | None = Field(default=None, description="CPU threads of tensor work; results depend on them")
    machine: str | None = Field(default=None, description="Processor, cores and memory, for a person")
    plan_counts: dict[str, int] = Field(default={}, description="Plan name -> clients that have it")
    plan_ranks: dict[str, dict[str, int]] = Field(default={}, description="Plan name -> module path -> rank")
    device_counts: dict[str, int] = Field(default={}, description="Simulated device -> clients that have it")
    policy: str | None = Field(default=None, description="How the server treats slow clients; null without devices")
    target_rouge_l: float | None = Field(default=None, description="Unseen ROUGE-L whose virtual time is of interest")
    trainer: str | None = Field(default=None, description="Training loop of the user's own; null for the built-in one")
    warnings: list[str] = []
    started: str | None = Field(default=None, description="ISO 8601 time at which the run first started")
    seconds: dict[str, float] = Field(default={}, description="Wall times outside the rounds")


def to_line(record: RoundRecord) -> str:
    """Return the record as one line of strict JSON, line break included."""
    return record.model_dump_json() + "\n"


def from_line(line: bytes) -> RoundRecord:
    """Return the record on a line.

    Raises:
        RecordsError: If it is damaged, or none.
    """
    try:
        return RoundRecord.model_validate_json(line)
    except ValidationError as error:
        raise RecordsError(_first_problem(error)) from error


def line_digest(line: bytes) -> str:
    """Return what a checkpoint keeps of a line, its break not counted: half of its SHA-256."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()[:32]


def round_spans(rounds: Sequence[int]) -> str:
    """Return rounds in words: ``round 3 is``, ``rounds 0 to 4, 7 are``."""
    spans: list[list[int]] = []
    for server_round in rounds:
        if spans and spans[-1][1] == server_round - 1:
            spans[-1][1] = server_round
        else:
            spans.append([server_round, server_round])
    words = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans[:5])
    words += " and others" if len(spans) > 5 else ""
    return f"round {words} is" if len(rounds) == 1 else f"rounds {words} are"


def append_record(path: Path, record: RoundRecord) -> None:
    """Add one line to a record file and bring it to the disk.

    Not atomic: a process that is killed while writing leaves part of a line, which `read_records` ignores and the next
    append removes.
    """
    is_new = not path.exists()
    path.touch(exist_ok=True)
    with path.open("r+b") as file:
        content = file.read()
        whole, torn = _split_torn_line(content)
        if torn:
            log.warning("%s: cut off an incomplete last line of %d bytes", path, len(torn))
        file.seek(len(whole))
        file.truncate()
        missing_break = b"\n" if whole and not whole.endswith(b"\n") else b""
        file.write(missing_break + to_line(record).encode())
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync(path.parent)


def read_records(path: Path | str) -> list[RoundRecord]:
    """Return the rounds in a record file, in order; none when there is no such file.

    A last line that a killed process left incomplete is dropped with a warning in the log.

    Raises:
        RecordsError: A complete line is not a round record, or rounds are not in ascending order.
    """
    return [record for _, record in recorded_lines(Path(path))]


def write_references(path: Path, references: ReferencesRecord) -> None:
    """Write the references atomically."""
    write_whole(path, sealed(references.model_dump_json(indent=1)) + "\n")


def read_references(path: Path) -> ReferencesRecord:
    """Return the references, all of them empty when there is no such file."""
    return _read_one(path, ReferencesRecord) or ReferencesRecord()


def write_manifest(path: Path, manifest: ManifestRecord) -> None:
    """Write the manifest atomically."""
    write_whole(path, sealed(manifest.model_dump_json(indent=1)) + "\n")


def read_manifest(path: Path) -> ManifestRecord | None:
    """Return the manifest, or None when there is no such file."""
    return _read_one(path, ManifestRecord)


def _split_torn_line(content: bytes) -> tuple[bytes, bytes]:
    """Split off a last line that is neither terminated nor complete."""
    end = content.rfind(b"\n") + 1
    fragment = content[end:]
    if not fragment:
        return content, b""
    try:
        from_line(fragment)
    except RecordsError:
        return content[:end], fragment
    return content, b""


def lines_of(path: Path) -> list[bytes]:
    """Return the lines of a record file, damaged ones included, without a last one that its writer left incomplete.

    What an editor adds is taken off: a byte order mark, UTF-16, carriage returns. Blank lines stay, so that the place
    of a line in the list is its number in the file.
    """
    whole, torn = _split_torn_line(_as_written(path.read_bytes()))
    if torn:
        log.warning(
            "%s: dropped an incomplete last line of %d bytes; its writer was interrupted",
            printable(str(path)),
            len(torn),
        )
    # Split at the byte, not with splitlines: JSON strings may hold U+2028 and other line breaks that end no line here.
    return [line.rstrip(b"\r") for line in whole.removesuffix(b"\n").split(b"\n")] if whole else []


def last_round(path: Path) -> int:
    """Return the last round in a record file, 0 where there is none; lines that cannot be read are passed over."""
    last = 0
    for line in lines_of(path) if path.exists() else []:
        try:
            last = max(last, from_line(line).server_round)
        except RecordsError:
            continue
    return last


def _as_written(content: bytes) -> bytes:
    """Return the bytes of a file in UTF-8 without a mark at their start, however an editor has stored them."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16").encode()
        except UnicodeError:
            return content
    return content.removeprefix(codecs.BOM_UTF8)


def recorded_lines(path: Path) -> Iterator[tuple[bytes, RoundRecord]]:
    """Yield the lines of a record file with their rounds; see ``read_records``."""
    previous = -1
    for number, line in enumerate(lines_of(path) if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            record = from_line(line)
        except RecordsError as error:
            raise RecordsError(
                f"{path}, line {number}, is not a round record: {error}; put a copy of the file back, or resume the "
                "run, which restores the rounds that its checkpoints hold"
            ) from error
        if record.server_round <= previous:
            raise RecordsError(
                f"{path}, line {number}: rounds must ascend; got round {record.server_round} after round {previous}; "
                "remove the lines of the older attempt"
            )
        previous = record.server_round
        yield line, record


def _read_one(path: Path, kind: type[RecordT]) -> RecordT | None:
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(unsealed(path.read_bytes())[0])
    except (SealError, ValidationError) as error:
        reason = error if isinstance(error, SealError) else _first_problem(error)
        raise RecordsError(f"{path} is not what it should be: {reason}; restore the file or remove it") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]


SIGNIFICANT_DIGITS = 6


def rounded(value: float) -> float:
    """Return the value with as many digits as records keep."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
