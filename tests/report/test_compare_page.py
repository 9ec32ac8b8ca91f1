"""The page of a comparison: complete, self-contained, safe, and there at every stage of a study."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flexlora import FlexLoraError
from flexlora.report.compare_page import write_page

MakeRow = Any
SECTIONS = ["headline", "results", "differences", "curves", "rates", "costs", "categories", "flags", "reading", "facts"]
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Collects what a test asks about, and complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.rows: list[list[str]] = []
        self.unlabelled: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes |= set(values)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.targets += [values[name] for name in ("href", "src", "aria-labelledby") if name in values]
        if values.get("tabindex") == "0" and tag != "pre" and not values.get("aria-label"):
            self.unlabelled.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path, rows: list[Any], **options: str) -> Page:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_page(folder, **options)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def whole(study_row: MakeRow) -> list[Any]:
    gaps = {"fedit_smallest": 0.0, "aligned": -0.05, "flexlora": 0.02, "base": 0.5, "fedit_largest": -0.2, "ffa": 0.07}
    gaps |= {"flora": 0.1, "rolora": 0.12}
    score = {"loss": 1.5, "rouge_l": 30.0, "exact_match": 10.0, "num_examples": 10, "num_tasks": 2}
    rows = study_row.study(gaps, categories={"Word Analogy": score})
    rows += study_row.study(gaps, seed=2, distribution="skewed")
    rows += [study_row("wild", draw, None if draw == 3 else 1.8) for draw in range(8)]
    rows += [study_row.tuning("aligned", rate, loss) for rate, loss in ((0.003, 1.9), (0.01, 1.7), (0.03, None))]
    rows += [study_row.tuning("flexlora", rate, loss) for rate, loss in ((0.003, 1.9), (0.01, 1.7))]
    return rows


def stages(study_row: MakeRow) -> dict[str, list[Any]]:
    return {
        "tuning": [study_row.tuning("aligned", 0.01, 1.7), study_row.tuning("aligned", 0.02, None)],
        "one": [study_row("aligned")],
        "pair": [study_row("aligned"), study_row("fedit_smallest")],
        "equal": [study_row(arm, draw) for arm in ("aligned", "fedit_smallest") for draw in range(4)],
        "diverged": [study_row(arm, draw, None) for arm in ("aligned", "fedit_smallest") for draw in range(4)],
        "failed": [study_row("aligned", unseen=None, validation_loss=None, curve=[], failure="refused")],
        "whole": whole(study_row),
    }


@pytest.mark.parametrize("stage", ["tuning", "one", "pair", "equal", "diverged", "failed", "whole"])
def test_the_page_is_complete_and_needs_nothing_at_every_stage(tmp_path: Path, study_row: MakeRow, stage: str) -> None:
    page = page_of(tmp_path / "study", stages(study_row)[stage])
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert all(target.removeprefix("#") in page.ids for target in page.targets)
    assert page.unlabelled == []
    assert not {"img", "link", "iframe"} & page.tags
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_the_numbers_on_the_page_are_those_of_the_rows(tmp_path: Path, study_row: MakeRow) -> None:
    page = page_of(tmp_path / "study", [r for r in whole(study_row) if r["distribution"] == "uniform"])
    assert "aligned has the lowest loss on unseen tasks, " in page.text
    losses = [row["unseen"]["loss"] for row in whole(study_row) if row["arm"] == "aligned" and row["phase"] == "test"]
    row = next(row for row in page.rows if row[0] == "aligned" and len(row) == 9)
    assert row[1] == "first" and row[2] == "8"
    assert row[3].startswith(f"{sum(losses[:8]) / 8:.4f} ± ")
    (chosen,) = [row for row in page.rows if row[0] == "flexlora" and "highest tried" in row[-1]]
    assert chosen[1:3] == ["1.900", "1.700"]
    assert any(row[0].startswith("wild †") and "1 of 8 runs diverged" in row[0] for row in page.rows)
    assert ["aligned", "1.500"] in page.rows
    assert any(row[:3] == ["wild", "uniform", "diverged"] for row in page.rows)


def test_another_reference_is_named_everywhere(tmp_path: Path, study_row: MakeRow) -> None:
    page = page_of(tmp_path / "study", whole(study_row), reference="flexlora")
    assert "Differences to flexlora" in page.text
    assert any(row[0] == "flexlora" and row[1] == "reference" for row in page.rows if len(row) == 9)


@pytest.mark.parametrize("evil", ["</script><script>x()</script>", "' onload='x()", '"><img src=x>', "{{ 7*7 }}"])
def test_names_and_reasons_cannot_break_out(tmp_path: Path, study_row: MakeRow, evil: str) -> None:
    rows = whole(study_row) + [study_row(evil, draw, distribution=evil) for draw in range(3)]
    rows += [study_row("aligned", 9, failure=evil)]
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "config.yaml").write_text(f"name: {evil}\n")
    page = page_of(tmp_path / "study", rows)
    assert "img" not in page.tags
    assert not [name for name in page.attributes if name.startswith("on")]
    assert evil in page.text


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlexLoraError, match=r"finished runs in rows\.jsonl"):
        write_page(tmp_path)


def test_the_page_of_many_runs_stays_small(tmp_path: Path, study_row: MakeRow) -> None:
    gaps = {f"arm-{n}": n / 100 for n in range(14)} | {"fedit_smallest": 0.0}
    rows = [row for n in range(2) for row in study_row.study(gaps, distribution=f"d{n}", seed=n)]
    page_of(tmp_path / "study", rows)
    assert (tmp_path / "study" / "report.html").stat().st_size < 500_000


def test_runs_that_serve_several_distributions_are_counted_once(study_row: MakeRow, tmp_path: Path) -> None:
    rows = [study_row("fedit_smallest", draw, seconds=60.0) for draw in range(2)]
    rows += [{**row, "distribution": "normal", "copy_of": "uniform"} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_page(tmp_path).read_text()
    assert "<dt>Runs</dt><dd>2</dd>" in text
    assert "<dt>Time of all runs</dt><dd>2" in text
