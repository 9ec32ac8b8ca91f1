"""The verb ``report``: one run's own page, or a comparison that leaves it alone."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexlora.cli import app
from flexlora.errors import FlexLoraError
from flexlora.report.page import write_report
from flexlora.report.runs_page import write_runs_page


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


def test_the_report_of_one_run_goes_to_the_page_asked_for_and_compares_nothing(whole_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    for _ in range(2):  # The second replaces the first.
        done = CliRunner().invoke(app, ["report", str(whole_run), "--out", str(page)])
        assert done.exit_code == 0 and f"Wrote {page}" in done.stdout and "compared" not in done.stdout
    CliRunner().invoke(app, ["report", str(whole_run)])
    assert page.read_bytes() == (whole_run / "report.html").read_bytes()


def test_a_report_replaces_nothing_but_a_report(whole_run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(whole_run, tmp_path / "other"))
    (tmp_path / "notes.html").write_text("mine")
    (whole_run / "report.html").write_text("of an earlier version")
    for out, message in (
        (other / "report.html", "never goes into the folder of another run"),
        (tmp_path / "notes.html", "replaces an earlier report of a run and nothing else"),
        (tmp_path / "page.pdf", "a file that ends in .html"),
        (tmp_path / "notes.html" / "page.html", "notes.html is a file; a folder is needed there"),
    ):
        with pytest.raises(FlexLoraError, match=message):
            write_report(whole_run, out=out)
    assert (tmp_path / "notes.html").read_text() == "mine" and not (other / "report.html").exists()
    assert write_report(whole_run, out=whole_run / "report.html").read_text() != "of an earlier version"


@pytest.mark.parametrize("second", ["{run}", "{run}/", "{run}/../{name}"])
def test_a_run_is_not_compared_with_itself(whole_run: Path, tmp_path: Path, second: str) -> None:
    folders = [str(whole_run), second.format(run=whole_run, name=whole_run.name)]
    done = CliRunner().invoke(app, ["report", *folders, "--out", str(tmp_path / "page.html")])
    assert isinstance(done.exception, FlexLoraError)
    assert "a comparison needs two different runs" in str(done.exception)
    with pytest.raises(FlexLoraError, match="a comparison needs two different runs"):
        write_runs_page(folders, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
