"""Decides where a page asked for by name may be written: it replaces an earlier page of its kind and nothing else."""

import os
from pathlib import Path

from flexlora.files import file_above
from flexlora.report.run_folder import CONFIG_FILE, ReportError
from flexlora.rounds.records import RECORDS_FILE

REPORT_FILE = "report.html"
"""The page in the folder of a run."""


COMPARISON_GENERATOR = "flexlora report of several runs"
"""What the page of a comparison says it was made by."""


REPORT_GENERATOR = "flexlora report of one run"
"""What the page of a run says it was made by."""


READ_BYTES = 2000
"""The start of a page, in which it says what it was made by."""


def check_comparison_place(out: Path) -> None:
    """Raise unless a comparison may be written there.

    Raises:
        ReportError: Naming the file and what to do.
    """
    _check_page(out)
    if _holds_run(out.parent):
        raise ReportError(
            "a comparison never goes into the folder of a run, whose own report it could replace; "
            f"{out.parent} is one: name a file elsewhere, as --out comparison.html"
        )
    if out.exists() and COMPARISON_GENERATOR.encode() not in _start(out):
        raise ReportError(f"--out replaces an earlier comparison and nothing else; {out} is another file")


def check_report_place(out: Path, run_folder: Path) -> None:
    """Raise unless the report of a run may be written there; its own `report.html` always may.

    Raises:
        ReportError: Naming the file and what to do.
    """
    _check_page(out)
    if _holds_run(out.parent) and not os.path.samefile(out.parent, run_folder):
        raise ReportError(
            f"a report never goes into the folder of another run; {out.parent} is one: name a file elsewhere, as "
            "--out page.html"
        )
    is_own = out.name == REPORT_FILE and _holds_run(out.parent)
    if out.exists() and not is_own and REPORT_GENERATOR.encode() not in _start(out):
        raise ReportError(f"--out replaces an earlier report of a run and nothing else; {out} is another file")


def _check_page(out: Path) -> None:
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ReportError(f"--out must be a page, a file that ends in .html; got {out}")
    if file := file_above(out):
        raise ReportError(f"--out: {file} is a file; a folder is needed there")


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG_FILE, RECORDS_FILE))


def _start(page: Path) -> bytes:
    with page.open("rb") as file:
        return file.read(READ_BYTES)
