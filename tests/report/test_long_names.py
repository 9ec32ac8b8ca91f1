"""Names without a place to break do not make pages scroll sideways; needs Chromium, without a driver."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flexlora.report.page import write_report
from flexlora.report.runs_page import write_runs_page
from flexlora.rounds.records import RoundRecord, append_record

CHROMIUM = shutil.which("chromium")
LONG = "workstation_of_the_hospital_" * 8
PROBE = """<script>addEventListener("load", () => {
  const width = () => document.scrollingElement.scrollWidth, folded = width();
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  document.title = "PROBE " + JSON.stringify([folded, width(), document.documentElement.clientWidth]);
});</script></head>"""


@pytest.fixture
def long_run(run_with_controls: Path, records: list[RoundRecord], tmp_path: Path) -> Path:
    """Returns a run whose types of clients and folder have long names."""
    folder = Path(shutil.copytree(run_with_controls, tmp_path / LONG))
    (folder / "records.jsonl").unlink()
    for record in records:
        renamed = re.sub(r"\btype(\d)", rf"{LONG}\1", record.model_dump_json())
        append_record(folder / "records.jsonl", RoundRecord.model_validate_json(renamed))
    (folder / "manifest.json").unlink()
    return folder


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path")
@pytest.mark.parametrize("width", [500, 1280])  # A window has at least 500 pixels; phones are emulated by a driver.
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_long_names_never_make_a_page_scroll_sideways(
    long_run: Path, run_with_controls: Path, tmp_path: Path, kind: str, width: int
) -> None:
    page = tmp_path / "page.html"
    if kind == "report":
        write_report(long_run, out=page)
    else:
        write_runs_page([run_with_controls, long_run], page)
    text = page.read_text()
    assert LONG in text
    page.write_text(text.replace("</head>", PROBE, 1))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>PROBE (.*?)</title>", shown)
    assert title
    folded, unfolded, room = json.loads(html.unescape(title[1]))
    assert folded <= room and unfolded <= room
