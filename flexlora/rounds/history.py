"""Brings the record file of a run in line with the checkpoint it is resumed from, and never lets a round get lost.

Every round has its line, and a checkpoint has the digest of every line before its own round's. A line that is gone or
damaged is written again from a checkpoint that holds it; where none does, the run is not resumed from there.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.files import write_whole
from flexlora.rounds.checkpoint import held_progress
from flexlora.rounds.records import RecordsError, from_line, line_digest, lines_of, round_spans
from flexlora.text import printable

log = logging.getLogger(__name__)


def history_lines(
    path: Path, last_round: int, checkpoints: Path, digests: Sequence[str], own: bytes | None = None
) -> list[bytes]:
    """Return the lines of rounds 0 to ``last_round``; those that the file has keep their bytes.

    Args:
        path: The record file; it may be missing.
        last_round: The last round to keep.
        checkpoints: Folder of checkpoints, each of which holds the record of its own round.
        digests: Of the lines of rounds 0, 1, ..., as many as are known; a line with another one is damaged.
        own: The line of ``last_round``, where the caller has it; that its line is missing is no damage then.

    Raises:
        RecordsError: Rounds are missing from the file and from all checkpoints, or are there twice.
    """
    known = dict(enumerate(digests)) | ({} if own is None else {last_round: line_digest(own)})
    found, damaged = _readable(path, known)
    wanted = range(last_round + 1)
    missing = [server_round for server_round in wanted if server_round not in found]
    held = (_held(checkpoints, known) if missing else {}) | ({} if own is None else {last_round: own})
    if lost := [server_round for server_round in missing if server_round not in held]:
        lines = f" (damaged: line {', '.join(map(str, damaged[:5]))})" if damaged else ""
        raise RecordsError(
            f"{path} must have the records of rounds 0 to {last_round}; {round_spans(lost)} missing{lines}, and no "
            "checkpoint holds what is missing: put a copy of the file back, or start anew with --overwrite"
        )
    # The last line alone may be missing because the process was killed before it could write it.
    if told := [place for place in missing if damaged or own is None or place != last_round]:
        log.warning("%s: %s missing or damaged; restored from checkpoints", printable(str(path)), round_spans(told))
    return [found.get(place) or held[place] for place in wanted]


def write_history(path: Path, lines: list[bytes]) -> None:
    """Make these the lines of a record file, atomically."""
    content = b"".join(line + b"\n" for line in lines)
    if not path.exists() or path.read_bytes() != content:
        write_whole(path, content)


def _readable(path: Path, known: Mapping[int, str]) -> tuple[dict[int, bytes], list[int]]:
    """Return round -> its line, and the numbers of the lines that are damaged."""
    found: dict[int, bytes] = {}
    damaged = []
    for number, line in enumerate(lines_of(path) if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            server_round = from_line(line).server_round
        except RecordsError:
            damaged.append(number)
            continue
        if known.get(server_round, line_digest(line)) != line_digest(line):
            damaged.append(number)
            continue
        if found and server_round <= max(found):
            raise RecordsError(
                f"{path}, line {number}: rounds must ascend; got round {server_round} after round {max(found)}; "
                "remove the lines of the older attempt"
            )
        found[server_round] = line
    return found, damaged


def _held(checkpoints: Path, known: Mapping[int, str]) -> dict[int, bytes]:
    """Return round -> line of every checkpoint that can be read."""
    held = {}
    for progress in held_progress(checkpoints):
        try:
            line = line_in(progress)
            server_round = from_line(line).server_round
        except (KeyError, TypeError, AttributeError, RecordsError):
            continue
        if known.get(server_round, line_digest(line)) == line_digest(line):
            held[server_round] = line
    return held


def line_in(progress: Mapping[str, Any]) -> bytes:
    """Return the line of its own round that a checkpoint's progress holds, without the break."""
    return progress["record"].encode().rstrip(b"\n")
