"""Nothing goes undocumented: methods, settings, verbs, links."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

from flexlora.aggregators.registry import AGGREGATORS, package_methods
from flexlora.aggregators.settings import options_of
from flexlora.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def reference_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration.md", "command-line.md", "data-flow.md", "methods/README.md"])
def test_generated_pages_are_up_to_date(name: str) -> None:
    expected = reference_writer().PAGES[name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, "run: make docs"


@pytest.mark.parametrize("name", package_methods())
def test_every_method_has_a_page_with_its_formula_and_source(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert "```" in page and "sum_i" in page and "arxiv.org" in page


def test_every_option_of_a_method_is_on_its_page() -> None:
    for name in package_methods():
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
        for option in options_of(AGGREGATORS[name]):
            assert f"method.{option}" in page


def test_every_verb_is_documented_with_an_example() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f"## `flexlora {name}`" in page
        assert command.epilog.startswith(f"Example: flexlora {name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")]), ids=lambda path: path.name
)
def test_benchmarks_and_scripts_import_names_that_exist(path: Path) -> None:
    # Many of them import when they are called: a name that has moved would only be missed then.
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexlora"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    alias.name
                )
