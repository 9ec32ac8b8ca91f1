"""docs/results.md says what the committed rows say."""

from pathlib import Path

from flexlora.report.results_page import filled_page, read_studies

ROOT = Path(__file__).parents[1]


def test_the_page_of_results_is_what_the_rows_give() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    rows = ROOT / "results"
    assert page == filled_page(page, read_studies(rows), rows / "capacity.jsonl"), (
        "run: python scripts/write_results.py"
    )


def test_what_the_rows_say_of_the_methods_comes_first_on_the_page() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page.startswith("# Results\n\n<!-- results: verdict -->\n")
