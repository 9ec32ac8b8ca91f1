"""The page: complete, self-contained, safe, small, and there at every stage of a run."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from flexlora import FlexLoraError
from flexlora.report.page import write_report
from flexlora.rounds.records import EvaluationRecord, RoundRecord, append_record

# What each run of the tests has something to show for.
SECTIONS = {
    "whole_run": "results curves categories fairness ranks clients energy spectra traffic time failures use "
    "configuration",
    "base_only_run": "results curves categories time",
    "running_run": "results curves categories fairness ranks clients energy spectra traffic time failures "
    "configuration",
}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LOADING = {"src", "href", "srcset", "data", "action", "poster", "formaction", "xlink:href", "background"}


class Page(HTMLParser):
    """Collects what a test asks about, and complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[tuple[str, str, str]] = []
        self.labelled_by: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.words: list[str] = []
        self.readings: list[str] = []
        self.unlabelled: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs), f"{tag} has an attribute twice"
        self.attributes |= set(values)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        self.links += [(tag, name, value) for name, value in values.items() if name in LOADING]
        self.labelled_by += [values[name] for name in ("aria-labelledby", "for") if name in values]
        if values.get("tabindex") == "0" and tag != "pre" and not values.get("aria-label"):
            self.unlabelled.append(tag)
        if "data-readings" in values:
            self.readings.append(values["data-readings"])
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append((values.get("type"), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        elif "style" not in self.open:
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(params=["whole_run", "base_only_run", "running_run"])
def any_run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_page_has_the_sections_that_hold_something_and_links_to_no_other(
    name: str, request: pytest.FixtureRequest
) -> None:
    text, page = page_of(request.getfixturevalue(name))
    wanted = SECTIONS[name].split()
    assert re.findall(r'<section id="([^"]+)"', text) == wanted
    links = [value for tag, key, value in page.links if (tag, key) == ("a", "href")]
    assert links == ["#main", *(f"#{section}" for section in wanted)]
    assert len(page.ids) == len(set(page.ids))
    assert set(page.labelled_by) <= set(page.ids)
    assert {value.removeprefix("#") for tag, _, value in page.links if tag == "a"} <= set(page.ids)
    assert page.unlabelled == []


def test_the_page_loads_nothing(any_run: Path) -> None:
    text, page = page_of(any_run)
    assert {tag for tag, _, value in page.links if not value.startswith("#")} == set()
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|WebSocket|\bimport\(", text)
    assert set(re.findall(r"https?://[^\"'\s<)]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_no_text_of_the_run_becomes_markup(whole_run: Path) -> None:
    text, page = page_of(whole_run)
    assert "<script>alert" not in text
    assert "<b>data" not in text
    assert "<script>alert('type1-" in page.text
    assert "path: <b>data & more</b>" in page.text
    assert sorted(kind or "code" for kind, _ in page.scripts) == ["application/json", "application/json", "code"]


@pytest.mark.parametrize("evil", ["</script><script>x()</script>", "' onload='x()", '"><img src=x>', "{{ 7*7 }}"])
def test_names_of_plans_and_modules_cannot_break_out(whole_run: Path, records: list[RoundRecord], evil: str) -> None:
    spectra = {f"model.{evil}": records[12].spectra["model.layers.0.self_attn.q_proj"]}
    client = records[12].clients[0].model_copy(update={"plan": evil, "ranks": {f"model.{evil}": 2}})
    append_record(
        whole_run / "records.jsonl",
        records[12].model_copy(update={"server_round": 13, "spectra": spectra, "clients": [client], "note": evil}),
    )
    _, page = page_of(whole_run)
    assert "img" not in {tag for tag, _, _ in page.links}
    assert [name for name in page.attributes if name.startswith("on")] == []
    assert evil in page.text
    assert len(page.scripts) == 3


def test_scripts_carry_valid_json(whole_run: Path) -> None:
    _, page = page_of(whole_run)
    data = json.loads(next(text for kind, text in page.scripts if kind))
    assert data["rounds"] == list(range(1, 13))
    assert len(data["modules"]) == 14
    assert [plan["name"] for plan in data["plans"]] == ["phone", "laptop", "workstation", "server"]
    assert data["plans"][2]["ranks"] == [6, 6, 6, 6, 16, 16, 16] * 2
    assert len(page.readings) == 10
    assert json.loads(page.readings[0])[0][1] == "Round 0"


def test_spectra_and_errors_in_the_page_are_those_of_the_records(whole_run: Path, records: list[RoundRecord]) -> None:
    _, page = page_of(whole_run)
    data = json.loads(next(text for kind, text in page.scripts if kind))
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def decode(codes: str, place: int, low: float, high: float) -> float:
        number = 64 * digits.index(codes[2 * place]) + digits.index(codes[2 * place + 1])
        return low + (high - low) * number / 4094

    for module, name in enumerate(data["modules"]):
        for column, server_round in enumerate(data["rounds"]):
            spectrum = records[server_round].spectra[name]
            indices, codes = data["values"][module][column].split(":")
            for place, k in enumerate(data["indices"][int(indices)]):
                shown = 10 ** decode(codes, place, data["low"], data["high"])
                assert shown == pytest.approx(spectrum.singular_values[k - 1], rel=2e-3)
            squares = [value**2 for value in spectrum.singular_values] + [spectrum.tail**2]
            for plan, ranks in enumerate(entry["ranks"] for entry in data["plans"]):
                error = decode(data["errors"][plan][module], column, 0.0, 1.0)
                assert error == pytest.approx((sum(squares[ranks[module] :]) / sum(squares)) ** 0.5, abs=2e-4)


def test_the_tables_hold_the_numbers_of_the_run(whole_run: Path) -> None:
    _, page = page_of(whole_run)
    rows = {row[0]: row[1:] for row in page.rows}
    # Final ROUGE-L is 12 + 30 (1 - 0.75^12) = 41.05.
    score, gain, alike, *_ = rows["Federated (flexlora)after round 12"]
    assert (score, alike) == ("41.0", "39.5") and re.fullmatch(r"\+29\.0\+\d\d\.\d to \+\d\d\.\d", gain)
    assert rows["FedIT at the smallest rank2 in every module"][1].startswith("+20.9")
    assert rows["Word Analogy"][:3] == ["15.6", "53.4", "42.8"]
    assert rows["All, weighted by examples"][:3] == ["12.0", "41.0", "32.9"]
    plans = [row[1:] for row in page.rows if row[0] == "phone2 in every module, type1"]
    assert [row[0] for row in plans] == ["13.0", "60", "11.5 kB"]
    assert "1 min 53 s" in rows["train"]


def test_every_reference_run_has_a_row_and_a_line_of_its_own_colour(run_with_controls: Path) -> None:
    text, page = page_of(run_with_controls)
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["Large clients aloneFedIT among 24 clients, 16 in every module"][1].startswith("+18.0")
    assert rows["FedIT at the largest rank16 in every module, learning rate 0.01"][1].startswith("+33.5")
    curve = text.split('id="curve-rouge-l"')[1].split("</figure>")[0]
    keys = re.findall(r'<i class="key (c\d)[^"]*"></i>([^<]+) <b>', curve)
    assert {name: style for style, name in keys} == {
        "Federated, flexlora": "c1",
        "FedIT, smallest rank": "c2",
        "Training alone": "c3",
        "FedIT, largest rank": "c4",
        "Large clients alone": "c5",
        "Base model": "c6",
    }


def test_the_base_alone_makes_a_page(base_only_run: Path) -> None:
    _, page = page_of(base_only_run)
    assert "Base model alone: ROUGE-L 12.0 of 100 on unseen tasks." in page.text


def test_numbers_that_are_not_numbers_make_a_page(tmp_path: Path, broken_numbers: RoundRecord) -> None:
    append_record(tmp_path / "records.jsonl", broken_numbers)
    _, page = page_of(tmp_path)
    assert "nan" not in page.text.lower().split()
    assert "inf" not in page.text.lower().split()


def test_a_manifest_alone_makes_a_page(whole_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "started"
    folder.mkdir()
    (folder / "manifest.json").write_bytes((whole_run / "manifest.json").read_bytes())
    _, page = page_of(folder)
    assert "No round is finished yet." in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlexLoraError, match=r"a run folder holds records.jsonl"):
        write_report(tmp_path)


def test_the_page_is_the_same_every_time(whole_run: Path) -> None:
    first = write_report(whole_run).read_bytes()
    assert write_report(whole_run).read_bytes() == first
    assert not list(whole_run.glob("*.partial"))


@pytest.mark.parametrize("large_run", [(6, 50, 80), (32, 12, 2)], indirect=True)
def test_a_large_run_stays_below_two_megabytes(large_run: Path) -> None:
    text, page = page_of(large_run)
    assert len(text.encode()) < 2_000_000
    data = json.loads(next(content for kind, content in page.scripts if kind))
    assert (data["rounds"][0], data["rounds"][-1]) in {(1, 50), (1, 12)}
    left_out = re.search(r"(\d+) rounds? left out evenly", page.text)
    assert len(data["rounds"]) + (int(left_out[1]) if left_out else 0) in {50, 12}


def test_the_template_is_found_beside_the_package() -> None:
    assert files("flexlora.report").joinpath("page.html.j2").is_file()


def test_reports_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, flexlora.report.page; "
        "assert not {'torch', 'transformers', 'peft', 'scipy', 'pandas'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_compares_runs_on_the_virtual_clock(folders: list[Path]) -> None:
    page = write_report(folders[0], folders[1:]).read_text(encoding="utf-8")
    section = page.split('<section id="virtual-time"')[1].split("</section>")[0]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section))
    # The weakest of the three, the reference, reached 16; the others did so after 200 and 40 seconds.
    assert "Time to ROUGE-L 16.0" in text
    assert re.search(r"patient wait 4 6 min 40 s .* 30\.0 3 min 20 s hasty async 4 40\.0 s .* 25\.0 40\.0 s", text)
    assert re.search(r"FedIT, smallest rank wait 4 3 min 20 s – – .* 16\.0 3 min 20 s", text)
    assert "ROUGE-L on unseen tasks over virtual time" in text and "over virtual minutes" in text
    assert "Validation loss over virtual time" in text
    assert re.search(r"watch 1 0 0 0 – –", text)


def test_a_run_without_devices_has_no_virtual_clock(
    tmp_path: Path, evaluation_of: Callable[..., EvaluationRecord]
) -> None:
    path = tmp_path / "plain"
    path.mkdir()
    append_record(path / "records.jsonl", RoundRecord(server_round=0, evaluation=evaluation_of(3)))
    assert "virtual-time" not in write_report(path).read_text(encoding="utf-8")
