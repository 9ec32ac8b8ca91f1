"""Generated parts of the page of results: right numbers, plain verdicts, the rest untouched."""

import json
from pathlib import Path
from typing import Any

import pytest

from flexlora import FlexLoraError
from flexlora.report.results_page import filled_page, read_studies, verdict_part

MakeRow = Any
HEADER = {
    "kind": "study",
    "name": "main",
    "title": "Main table",
    "question": "Which method is best?",
    "command": "flexlora compare configs/main.yaml --draws 8",
    "config": "configs/main.yaml",
    "machine": "two cores, 5 hours",
    "reference": "fedit_smallest",
    "verdict": True,
}
PAGE = "# Results\n\n{}\n\nProse stays.\n\n{}\n\nThe end.\n".format(
    *(f"<!-- results: {name} -->\nold\n<!-- end of results: {name} -->" for name in ("verdict", "main"))
)


def write(folder: Path, rows: list[Any], **changed: Any) -> Path:
    header = {**HEADER, **changed}
    (folder / f"{header['name']}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
    return folder


def study(study_row: MakeRow, **gaps: float) -> list[Any]:
    return study_row.study({"fedit_smallest": 0.0, "flexlora": 0.03, "aligned": -0.05, "base": 0.5, **gaps})


def test_parts_are_renewed_and_prose_stays(tmp_path: Path, study_row: MakeRow) -> None:
    rows = study(study_row)
    page = filled_page(PAGE, read_studies(write(tmp_path, rows)))
    assert "old" not in page and "\nProse stays.\n" in page and page.endswith("\n\nThe end.\n")
    assert filled_page(page, read_studies(tmp_path)) == page
    assert "### Main table\n\nWhich method is best?\n" in page
    assert "```bash\nflexlora compare configs/main.yaml --draws 8\n```" in page
    losses = [row["unseen"]["loss"] for row in rows if row["arm"] == "aligned"]
    (line,) = [line for line in page.splitlines() if line.startswith("| `aligned` | 8 |")]
    assert line.startswith(f"| `aligned` | 8 | {sum(losses) / 8:.4f} ± ")
    assert "| `aligned` | 1.0 kB | 2.0 kB | 1.00 × | 500 ms | 20.0 s |" in page


def test_the_first_paragraph_says_where_flexlora_does_not_win(tmp_path: Path, study_row: MakeRow) -> None:
    rows = study(study_row) + [{**row, "distribution": "skewed"} for row in study(study_row)]
    said = verdict_part(read_studies(write(tmp_path, rows)))
    assert said.startswith(
        "**FlexLoRA as published (`flexlora`) does not win on uniform (there aligned is ahead) and skewed "
        "(there aligned is ahead).** Against `fedit_smallest` it is at +0.0"
    )
    assert "**Aligned averaging (`aligned`) is first on uniform and skewed.**" in said


def test_a_tie_is_called_a_tie(tmp_path: Path, study_row: MakeRow) -> None:
    rows = study_row.study({"fedit_smallest": 0.2, "flexlora": 0.0, "aligned": 0.0}, noise=0.02)
    said = verdict_part(read_studies(write(tmp_path, rows)))
    assert "(`flexlora`) is tied for first on uniform.**" in said
    assert "(`aligned`) is tied for first on uniform.**" in said


def test_only_studies_that_decide_are_in_the_first_paragraph(tmp_path: Path, study_row: MakeRow) -> None:
    assert verdict_part([]) == "No study has been recorded that decides yet."
    studies = read_studies(write(tmp_path, study(study_row), verdict=False))
    assert verdict_part(studies) == "No study has been recorded that decides yet."


def test_rates_that_were_tried_stand_on_the_page_with_the_choice_in_bold(tmp_path: Path, study_row: MakeRow) -> None:
    rows = [*study(study_row), *(study_row.tuning("flexlora", rate, 1 + rate) for rate in (0.01, 0.02))]
    page = filled_page(PAGE, read_studies(write(tmp_path, rows)))
    assert "| `flexlora` | **1.0100** | 1.0200 |" in page


def test_the_papers_tables_follow_the_study_that_decides(tmp_path: Path, study_row: MakeRow) -> None:
    studies = read_studies(write(tmp_path, study(study_row)))
    assert "#### In the shape of the paper's tables" in filled_page(PAGE, studies)
    studies = read_studies(write(tmp_path, study(study_row), verdict=False))
    assert "#### In the shape of the paper's tables" not in filled_page(PAGE, studies)


def test_reservations_are_listed_and_cannot_break_the_page(tmp_path: Path, study_row: MakeRow) -> None:
    rows = [*study(study_row), study_row("wild", 0, failure="bad | <b>*x*</b>\nline")]
    page = filled_page(PAGE, read_studies(write(tmp_path, rows)))
    assert r"- uniform, `wild`: draw 0: bad \| \<b\>\*x\*\</b\> line; counted as the worst" in page


def test_studies_and_parts_must_match(tmp_path: Path, study_row: MakeRow) -> None:
    studies = read_studies(write(tmp_path, study(study_row)))
    with pytest.raises(FlexLoraError, match="not once: main"):
        filled_page(PAGE.replace("results: main", "results: other"), studies)
    with pytest.raises(FlexLoraError, match="without a study: main"):
        filled_page(PAGE, [])
    with pytest.raises(FlexLoraError, match="has no <!-- end of results: main -->"):
        filled_page(PAGE.replace("end of results: main", "end"), studies)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"kind": "run?"}, "missing: kind"),
        ({"title": None}, "missing: title"),
        ({"name": "verdict"}, "other than verdict"),
    ],
)
def test_a_study_without_its_header_is_refused(
    tmp_path: Path, study_row: MakeRow, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(FlexLoraError, match=said):
        read_studies(write(tmp_path, study(study_row), **changed))


def test_an_incomplete_file_is_refused(tmp_path: Path, study_row: MakeRow) -> None:
    path = write(tmp_path, study(study_row)) / "main.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    with pytest.raises(FlexLoraError, match="copy the rows again"):
        read_studies(tmp_path)
