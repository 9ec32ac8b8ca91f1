"""Both pages in a real browser: no script error, no request, no sideways scrolling, controls that work, few sheets.

Needs Chromium with its driver from the distribution (``apt install chromium chromium-driver``) and selenium.
"""

import base64
import csv
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexlora.report.answer_file import AnswerRecord, ModelAnswer, write_answers
from flexlora.report.page import write_report
from flexlora.report.runs_page import write_runs_page
from flexlora.rounds.records import RoundRecord, append_record, read_manifest, write_manifest

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
if not CHROMIUM or not DRIVER:
    pytest.skip("needs chromium and chromedriver on the path", allow_module_level=True)

HEIGHT_BEFORE = 13_833
"""Of the phone page of the demo, all sections unfolded, before sections could be folded."""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    yield driver
    driver.quit()


@pytest.fixture
def run_page(run_with_controls: Path) -> Path:
    """The page of a run with answers, so that every section but the virtual clock is there."""
    examples = [
        AnswerRecord(task=f"task {n}", category="x", number=0, prompt="Name " + "it " * n, references=["snow"])
        for n in range(9)
    ]
    for place, model in enumerate(("base", "fedit_smallest_rank", "federated")):
        said = [
            ModelAnswer(text="word " * 40, rouge_l=place * 10.0 + (n - 4) * place, exact_match=False) for n in range(9)
        ]
        write_answers(run_with_controls / "answers.jsonl", examples, {model: said})
    return write_report(run_with_controls)


@pytest.fixture
def comparison_page(run_with_controls: Path, records: list[RoundRecord], tmp_path: Path) -> Path:
    other = Path(shutil.copytree(run_with_controls, tmp_path / "a run with a much longer name than the other"))
    manifest = read_manifest(other / "manifest.json")
    assert manifest
    write_manifest(other / "manifest.json", manifest.model_copy(update={"seed": 43}))
    append_record(other / "records.jsonl", records[2].model_copy(update={"server_round": 13}))
    return write_runs_page([run_with_controls, other], tmp_path / "comparison.html")


@pytest.fixture(params=["run_page", "comparison_page"])
def any_page(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def show(browser: Any, page: Path, width: int) -> None:
    """Load a page on a screen of this width, with the logs of earlier pages thrown away."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())


def requests_of(browser: Any) -> list[str]:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("about:", "blob:"))]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_runs_without_errors_or_requests_and_never_scrolls_sideways(
    browser: Any, any_page: Path, width: int
) -> None:
    show(browser, any_page, width)
    wide = "return [document.scrollingElement.scrollWidth, document.documentElement.clientWidth]"
    page, room = browser.execute_script(wide)
    assert page <= room <= width
    browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    page, room = browser.execute_script(wide)
    assert page <= room <= width
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [any_page.as_uri()]


def test_the_page_of_a_run_is_short_on_a_phone_and_on_paper(browser: Any, run_page: Path) -> None:
    show(browser, run_page, 390)
    assert browser.execute_script("return document.scrollingElement.scrollHeight") <= HEIGHT_BEFORE / 3
    paper = base64.b64decode(browser.print_page())
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", paper)) <= 6


def test_a_link_opens_its_section(browser: Any, any_page: Path) -> None:
    show(browser, any_page, 390)
    for link in browser.find_elements("css selector", "nav a"):
        target = link.get_attribute("href").rpartition("#")[2]
        browser.execute_script("arguments[0].click()", link)
        time.sleep(0.1)
        assert browser.execute_script(f"return document.querySelector('#{target} > details').open"), target
    for summary in browser.find_elements("css selector", "summary"):
        was = browser.execute_script("return arguments[0].parentElement.open", summary)
        browser.execute_script("arguments[0].click()", summary)
        assert browser.execute_script("return arguments[0].parentElement.open", summary) != was
    assert browser.get_log("browser") == []


def test_a_wide_table_says_that_it_scrolls_and_a_narrow_one_does_not(browser: Any, run_page: Path) -> None:
    state = """return [...document.querySelectorAll('.scroll')].filter((box) => box.clientWidth).map((box) =>
        [box.scrollWidth - box.clientWidth > 1, !box.previousElementSibling.hidden])"""
    for width in (390, 1280):
        show(browser, run_page, width)
        boxes = browser.execute_script(state)
        assert boxes and all(overflows == hinted for overflows, hinted in boxes)
    assert browser.execute_script("return document.querySelectorAll('.scroll').length") >= len(boxes)


def test_downloads_hold_the_numbers_of_the_run(
    browser: Any, run_page: Path, downloads: Path, records: list[RoundRecord]
) -> None:
    show(browser, run_page, 1280)
    names = []
    for button in browser.find_elements("css selector", "[data-file]"):
        names.append(button.get_attribute("data-file"))
        (downloads / names[-1]).unlink(missing_ok=True)
        browser.execute_script("arguments[0].click()", button)
        until = time.time() + 10
        while not (downloads / names[-1]).exists() and time.time() < until:
            time.sleep(0.1)
    assert names == ["scores.csv", "rounds.csv", "tasks.csv", "report.json"]
    with (downloads / "rounds.csv").open(newline="") as file:
        rounds = list(csv.DictReader(file))
    assert [row["train_loss"] for row in rounds[1:]] == [str(record.train_loss) for record in records[1:]]
    whole = json.loads((downloads / "report.json").read_text())
    assert [row["rouge_l"] for row in whole["rounds"]] == [
        record.evaluation.unseen.rouge_l if record.evaluation else None for record in records
    ]


def test_charts_answer_to_keys_and_the_spectra_to_their_controls(browser: Any, run_page: Path) -> None:
    show(browser, run_page, 1280)
    for plot in browser.find_elements("css selector", ".plot[data-readings]"):
        browser.execute_script(
            "arguments[0].dispatchEvent(new KeyboardEvent('keydown', { key: 'End', bubbles: true }))", plot
        )
        assert browser.execute_script("return !arguments[0].querySelector('.tip').hidden", plot)
        assert browser.execute_script("return arguments[0].querySelector('.tip strong').textContent", plot)
    choose = "const one = document.getElementById('{}'); one.value = {}; one.dispatchEvent(new Event('{}'));"
    text = "return document.getElementById('{}').textContent"
    browser.execute_script(choose.format("pick-module", 3, "change"))
    assert browser.execute_script(text.format("spectrum-title")) == "model.layers.0.self_attn.o_proj"
    browser.execute_script(choose.format("pick-round", 4, "input"))
    assert [browser.execute_script(text.format(name)) for name in ("round-out", "error-round")] == ["5", "5"]
    browser.execute_script(choose.format("pick-plan", 2, "change"))
    assert browser.execute_script(text.format("heat-title")) == "workstation"
    assert browser.get_log("browser") == []
