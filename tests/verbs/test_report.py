"""The verb ``report``: one run's own page, or a comparison that leaves it alone."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexlora.cli import app


def test_one_run_has_its_report_written_again(whole_run: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(whole_run)])
    assert done.exit_code == 0
    assert (whole_run / "report.html").is_file()
    assert f"Wrote {whole_run / 'report.html'}" in done.stdout


def test_several_runs_go_on_a_page_here_and_their_reports_stay(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(whole_run, tmp_path / "other"))
    (whole_run / "report.html").write_text("own")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", str(whole_run), str(other)])
    assert done.exit_code == 0 and (tmp_path / "comparison.html").is_file()
    assert (whole_run / "report.html").read_text() == "own" and not (other / "report.html").exists()
    assert "other ends level with demo in ROUGE-L" in done.stdout


def test_json_has_a_row_for_each_run(whole_run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(whole_run), "--out", str(tmp_path / "page.html"), "--json"])
    found = json.loads(done.stdout)
    assert found["report"] == str(tmp_path / "page.html")
    assert [row["run"] for row in found["runs"]] == ["demo"]
    assert found["runs"][0]["rouge_l"] == pytest.approx(12 + 30 * (1 - 0.75**12))
