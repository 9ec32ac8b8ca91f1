"""Imports run one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flexlora"

# Lowest first; a module imports from lower layers, and inside its own layer only what ALLOWED names.
LAYERS = (
    ("lora", "config"),
    ("clients", "partition", "report", "costs"),
    ("uplink", "aggregators", "engines.base", "data", "model", "adapters", "checkpoint"),
    ("training", "evaluation", "rounds", "doctor"),
    ("engines",),
    ("participants",),
    ("workbench",),
    ("references", "planning"),
    ("experiment",),
    ("display",),
    ("cli",),
)
ALLOWED = {
    ("partition", "clients"),
    ("evaluation", "training"),
    ("adapters", "model"),
    ("aggregators", "uplink"),
    ("model", "adapters"),
}


def layer_of(module: str) -> tuple[int, str]:
    matches = [
        (number, name)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} has no place in the layers; add it to DESIGN's picture and to LAYERS"
    return max(matches, key=lambda match: len(match[1]))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = (
                [node.module or ""] if node.module != "flexlora" else [f"flexlora.{alias.name}" for alias in node.names]
            )
        for name in names:
            target = name.removeprefix("flexlora.")
            if name.startswith("flexlora.") and (PACKAGE / target.replace(".", "/")).with_suffix(".py").exists():
                yield target
            elif name.startswith("flexlora.") and (PACKAGE / target.replace(".", "/")).is_dir():
                yield target


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return
    own_layer, own_name = layer_of(module)
    for target in imported(path):
        layer, name = layer_of(target)
        fine = name == own_name or layer < own_layer or (own_name, name) in ALLOWED
        assert fine, f"{module} must not import {target}"


@pytest.mark.parametrize("folder", ["lora"])
def test_the_kernel_imports_torch_and_nothing_else_of_ours(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        assert all(target.startswith("lora") for target in imported(path))


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_heavy_library() -> None:
    assert not {"torch", "transformers", "peft", "datasets", "flwr"} & loaded_by("import flexlora")


def test_the_report_needs_neither_torch_nor_transformers() -> None:
    assert not {"torch", "transformers", "peft"} & loaded_by("import flexlora.report.page")


def test_the_command_line_starts_without_heavy_libraries() -> None:
    assert not {"torch", "transformers", "peft", "datasets"} & loaded_by("import flexlora.cli")
