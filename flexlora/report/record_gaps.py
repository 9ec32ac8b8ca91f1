"""Finds rounds whose records a run has lost, or that somebody changed: sums over records would be wrong without a word.

Every round has its line in the record file, from round 0 on, and a checkpoint has the digest of every line before its
own round's. A folder without checkpoints still shows the rounds that are missing between others.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexlora.foreign import ForeignError, read_json
from flexlora.rounds.records import (
    CHECKPOINTS_FOLDER,
    RECORDS_FILE,
    RecordsError,
    RoundRecord,
    from_line,
    line_digest,
    round_spans,
)
from flexlora.seal import SealError, unsealed

STATE_FILE = "state.json"


@dataclass(frozen=True)
class KnownRounds:
    """What the checkpoints of a run say about its records.

    Attributes:
        digests: Round -> digest of its line; only the newest round's in runs of earlier versions.
        num_rounds: Rounds that must be on record, round 0 included.
    """

    digests: Mapping[int, str] = field(default_factory=dict)
    num_rounds: int = 0


@dataclass(frozen=True)
class RecordGaps:
    """Rounds whose records are missing, and rounds whose records are not as the run wrote them."""

    missing: Sequence[int] = ()
    changed: Sequence[int] = ()
    last: int = 0

    def in_words(self) -> list[str]:
        """Return one sentence on either, none where nothing is wrong."""
        words = []
        if self.missing:
            words.append(
                f"Of rounds 0 to {self.last}, {round_spans(self.missing)} missing from {RECORDS_FILE}: bytes, times, "
                "counts and curves leave them out. Put a copy of the file back, or resume the run (flexlora run "
                "--resume), which restores what its checkpoints hold."
            )
        if self.changed:
            words.append(
                f"{RECORDS_FILE} is not as the run wrote it: {round_spans(self.changed)} changed since. "
                "Put a copy of the file back."
            )
        return words


def known_rounds(run_folder: Path) -> KnownRounds:
    """Return what the newest checkpoint that can be read says; ask before the records are read, which may grow."""
    places = [path for path in (run_folder / CHECKPOINTS_FOLDER).glob("round-*") if path.name[6:].isdecimal()]
    for place in sorted(places, key=lambda path: int(path.name[6:]), reverse=True):
        try:
            progress = read_json(unsealed((place / STATE_FILE).read_bytes())[0], STATE_FILE)["progress"]
            digests = progress["loop"].get("history", ())
            own = from_line(progress["record"].encode())
        except (OSError, SealError, ForeignError, RecordsError, KeyError, TypeError, AttributeError):
            continue
        if own.evaluation is None:
            # Its line may have to wait for its scores.
            return KnownRounds(dict(enumerate(map(str, digests))), own.server_round)
        known = dict(enumerate(map(str, digests))) | {own.server_round: line_digest(progress["record"].encode())}
        return KnownRounds(known, own.server_round + 1)
    return KnownRounds()


def record_gaps(known: KnownRounds, found: Iterable[tuple[bytes, RoundRecord]]) -> RecordGaps:
    """Return what is wrong with the lines of a record file.

    Args:
        known: What checkpoints say about them.
        found: The lines of the file, each with its record.
    """
    lines = {record.server_round: line for line, record in found}
    num_rounds = max([known.num_rounds, *(server_round + 1 for server_round in lines)])
    changed = [
        server_round
        for server_round, digest in known.digests.items()
        if server_round in lines and line_digest(lines[server_round]) != digest
    ]
    return RecordGaps([place for place in range(num_rounds) if place not in lines], changed, num_rounds - 1)
