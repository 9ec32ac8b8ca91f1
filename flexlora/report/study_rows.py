"""Reads the rows of a comparison: JSON lines, one a finished run.

A row is a plain mapping, because its writer may add to it. What statistics need is checked here, once.
"""

import logging
import math
from pathlib import Path
from typing import Any

from flexlora.errors import FlexLoraError
from flexlora.foreign import ForeignError, read_json

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""One finished run; see `REQUIRED` for what every row has."""

ROWS_FILE = "rows.jsonl"
DEFAULT_REFERENCE = "fedit_smallest"
"""Label of the arm that differences are taken to, unless another is named."""

REQUIRED = {
    "phase": str,
    "draw": int,
    "distribution": str,
    "arm": str,
    "learning_rate": (int, float),
    "rounds": int,
    "curve": list,
}
PHASES = ("tuning", "test")


class StudyError(FlexLoraError, ValueError):
    """Rows of a comparison cannot be read or used."""


def read_rows(path: Path | str) -> list[Row]:
    """Return the rows of kind ``run`` of a file, in its order; none if there is no file.

    A last line that a killed process left incomplete is dropped with a warning in the log. If a run is there twice
    (same phase, distribution, arm, draw and learning rate), the later row holds.

    Raises:
        StudyError: A line is not a row, and not an incomplete last one.
    """
    rows = {}
    for row in read_lines(Path(path)):
        if row.get("kind") == "run":
            rows[row["phase"], row["distribution"], row["arm"], row["draw"], row["learning_rate"]] = row
    return list(rows.values())


def read_lines(path: Path) -> list[Row]:
    """Return every JSON object of a file of lines, rows checked; see `read_rows`."""
    if not path.exists():
        return []
    found = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = read_json(line, path)
        except ForeignError as error:
            if number == len(lines):
                log.warning("%s: dropped an incomplete last line of %d bytes", path, len(line))
                continue
            told = f"{path}, line {number} is not JSON ({error.reason})"
            raise StudyError(f"{told}; remove it and repeat that run") from None
        found.append(_checked(value, f"{path}, line {number}"))
    return found


def number(value: object) -> float | None:
    """Return a finite number, or None for what is missing, NaN, infinite or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _checked(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise StudyError(f"{where}: a row must be a JSON object; got {type(value).__name__}; remove the line")
    if value.get("kind") != "run":
        return value
    for key, kind in REQUIRED.items():
        if not isinstance(value.get(key), kind) or isinstance(value.get(key), bool):
            raise StudyError(f"{where}: {key} is missing or of a wrong type; got {value.get(key)!r}; repeat that run")
    if value["phase"] not in PHASES:
        raise StudyError(f"{where}: phase must be one of {', '.join(PHASES)}; got {value['phase']!r}")
    return value
