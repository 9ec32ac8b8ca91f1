"""Imports run one way, and importing the package is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import flexlora

PACKAGE = Path(__file__).parents[1] / "flexlora"
ROOT_FILE = PACKAGE / "__init__.py"
HEAVY = {"torch", "transformers", "peft", "datasets", "flwr", "matplotlib", "ray"}

# Lowest first; a module imports from lower layers, and inside its own layer only what ALLOWED names.
LAYERS = (
    ("lora", "config", "tensor_file", "progress"),
    ("clients", "partition", "report", "costs"),
    (
        "uplink",
        "aggregators",
        "engines.base",
        "data",
        "model",
        "adapters",
        "adapter_folder",
        "adapter_group",
        "checkpoint",
        "devices",
        "clock",
        "buffering",
    ),
    (
        "training",
        "evaluation",
        "rounds",
        "doctor",
        "whole_model",
        "merging",
        "inspection",
        "workload",
        "group_layers",
        "group_decoder",
    ),
    ("group_training",),
    ("engines",),
    ("participants",),
    ("workbench",),
    ("references", "planning"),
    ("experiment",),
    ("display", "display_merge", "picture"),
    ("cli",),
)
ALLOWED = {
    ("partition", "clients"),
    ("evaluation", "training"),
    ("adapters", "adapter_folder"),
    ("adapter_group", "adapter_folder"),
    ("adapters", "model"),
    ("aggregators", "uplink"),
    ("model", "adapters"),
    ("clock", "devices"),
    ("buffering", "clock"),
    ("group_decoder", "group_layers"),
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
        return  # At the bottom and on top at once; the two tests below say how.
    own_layer, own_name = layer_of(module)
    for target in imported(path):
        layer, name = layer_of(target)
        fine = name == own_name or layer < own_layer or (own_name, name) in ALLOWED
        assert fine, f"{module} must not import {target}"


def typed_names() -> dict[str, str]:
    """Return public name -> module, as the package tells type checkers."""
    blocks = [node for node in ast.parse(ROOT_FILE.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    typed = next(block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING")
    return {
        alias.name: node.module or "" for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_package_itself_imports_nothing_of_ours_until_a_name_is_asked_for() -> None:
    # Every module imports the package for its base error, so the package has to stand below all of them. The names it
    # offers come from above: type checkers read them in one block that never runs, __getattr__ looks them up.
    assert set(imported(ROOT_FILE)) == {module.removeprefix("flexlora.") for module in typed_names().values()}
    assert not {name for name in loaded_by("import flexlora") if name.startswith("flexlora.")}


def test_modules_take_from_the_package_only_what_it_holds_itself() -> None:
    # A public name would be an import from a higher layer that the test of the layers cannot see.
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "flexlora":
                assert {alias.name for alias in node.names} <= {"FlexLoraError", "__version__"}, path


def test_type_checkers_see_the_names_that_can_be_imported() -> None:
    assert typed_names() == flexlora._HOMES
    assert sorted(flexlora.__all__) == sorted([*typed_names(), "FlexLoraError", "__version__"])
    assert set(flexlora.__all__) <= set(dir(flexlora))


def test_every_public_name_resolves_in_a_fresh_process() -> None:
    found = loaded_by("import flexlora; assert all(getattr(flexlora, name) for name in flexlora.__all__)")
    assert {"torch", "transformers", "peft"} <= found


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'flexlora' has no attribute 'no_such_name'"):
        _ = flexlora.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("folder", ["lora"])
def test_the_kernel_imports_torch_and_nothing_else_of_ours(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        assert all(target.startswith("lora") for target in imported(path))


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_heavy_library() -> None:
    assert not HEAVY & loaded_by("import flexlora")
    assert not HEAVY & loaded_by("from flexlora import Config, load_config, read_records, write_report")


def test_the_report_needs_neither_torch_nor_transformers() -> None:
    assert not HEAVY & loaded_by("import flexlora.report.page")


def test_merging_needs_no_model_library() -> None:
    found = loaded_by("import flexlora.merging, flexlora.inspection, flexlora.display_merge")
    assert not (HEAVY - {"torch"}) & found


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""


def test_the_command_line_starts_without_heavy_libraries() -> None:
    assert not HEAVY & loaded_by("import flexlora.cli")
