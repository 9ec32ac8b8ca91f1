"""Write the generated parts of docs/results.md from results/*.jsonl, or check that they are current."""

import argparse
import sys
from pathlib import Path

from flexlora.report.results_page import filled_page, read_studies

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
ROWS = ROOT / "results"


def main() -> int:
    """Write the page, or check it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    expected = filled_page(page, read_studies(ROWS), ROWS / "capacity.jsonl")
    if check and page != expected:
        print(f"{PAGE.name} is out of date; run: python scripts/write_results.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(expected, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
