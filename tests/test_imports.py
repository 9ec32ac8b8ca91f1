"""Imports run one way, without exceptions, and importing the package is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flexlora

PACKAGE = Path(__file__).parents[1] / "flexlora"
ROOT_FILE = PACKAGE / "__init__.py"
HEAVY = {"torch", "transformers", "peft", "datasets", "flwr", "matplotlib", "nvflare", "ray", "pandas"}

RANKS = {
    "text": -1,
    "errors": 0,
    "files": 0,
    "hub_reach": 0,
    "limits": 0,
    "pattern_tree": 0,
    "foreign_logs": 0,
    "orphans": 0,
    "time_limit": 0,
    "console": 0,
    "progress": 0,
    "foreign": 1,
    "locks": 1,
    "patterns": 1,
    "seal": 1,
    "lora": 1,
    "federation": 2,
    "data": 3,
    "uplink": 3,
    "adapters": 3,
    "aggregators": 4,
    "training": 4,
    "engines": 5,
    "rounds": 6,
    "report": 7,
    "experiment": 8,
    "cli": 10,
    "testing": 9,
    "trainers": 9,
    "flower": 9,
    "nvflare": 9,
    "verbs": 9,
}
# What rooms may see of lower rooms, where that is less than all of it.
NARROW = {
    "rounds": {
        "aggregators": {"base"},
        "engines": {"base"},
        "uplink": {"base", "clip_and_noise", "compression", "privacy_budget", "quantise", "robust_settings"}
        | {"robust_weights", "wire"},
        "training": set(),
    },
    "report": {room: set() for room in ("lora", "federation", "data", "uplink", "adapters")}
    | {room: set() for room in ("aggregators", "training", "engines")}
    | {"rounds": {"records"}},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, deferred imports included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            target = PACKAGE.joinpath(*name.split(".")[1:])
            if name.startswith("flexlora.") and target.with_suffix(".py").exists():
                yield name.removeprefix("flexlora.")


def by_file(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(PACKAGE)))


@by_file([path for path in FILES if path != ROOT_FILE])
def test_a_room_imports_itself_and_rooms_of_lower_rank(path: Path) -> None:
    own, _, _ = module_of(path).partition(".")
    assert own in RANKS, f"{own} has no rank; DESIGN names the rooms"
    for target in imported(path):
        room, _, rest = target.partition(".")
        assert room == own or RANKS[room] < RANKS[own], f"{module_of(path)} must not import {target}"
        allowed = NARROW.get(own, {}).get(room)
        assert allowed is None or rest in allowed, f"{module_of(path)} may see {sorted(allowed)} of {room}, not {rest}"


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_no_files_of_a_room_import_one_another_in_a_circle(room: str) -> None:
    files = {module_of(path): path for path in (PACKAGE / room).rglob("*.py")}
    graph = {name: {target for target in imported(path) if target in files} for name, path in files.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("room", sorted(room for room in RANKS if (PACKAGE / room).is_dir()))
def test_the_init_file_of_a_room_is_its_docstring(room: str) -> None:
    (docstring,) = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)


@by_file([path for path in FILES if path.name != "cli.py"])
def test_nobody_but_the_command_line_imports_the_package_itself(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "flexlora":
            assert all((PACKAGE / f"{alias.name}.py").exists() for alias in node.names), path
        assert not (isinstance(node, ast.Import) and any(alias.name == "flexlora" for alias in node.names)), path


@by_file(
    [path for path in FILES if module_of(path).partition(".")[0] not in ("experiment", "verbs", "cli", "__init__")]
)
def test_only_the_experiment_and_the_command_line_see_the_configuration(path: Path) -> None:
    assert not [target for target in imported(path) if target.startswith("experiment.config")]


def typed_names() -> dict[str, str]:
    """Return public name -> module, as the package tells type checkers."""
    blocks = [node for node in ast.parse(ROOT_FILE.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    typed = next(block for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING")
    return {
        alias.name: node.module or "" for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_package_itself_imports_nothing_of_ours_until_a_name_is_asked_for() -> None:
    # Type checkers read the public names in one block that never runs; __getattr__ looks them up.
    modules = {module.removeprefix("flexlora.") for module in typed_names().values()}
    assert set(imported(ROOT_FILE)) == modules | set(flexlora._MODULES)
    assert not {name for name in loaded_by("import flexlora") if name.startswith("flexlora.")}


def test_type_checkers_see_the_names_that_can_be_imported() -> None:
    assert typed_names() == flexlora._HOMES
    assert sorted(flexlora.__all__) == sorted([*typed_names(), "__version__"])
    assert set(flexlora.__all__) <= set(dir(flexlora))


def test_every_public_name_resolves_in_a_fresh_process() -> None:
    found = loaded_by("import flexlora; assert all(getattr(flexlora, name) for name in flexlora.__all__)")
    assert {"torch", "transformers", "peft"} <= found


def test_modules_for_own_code_are_there_without_an_import_of_their_own() -> None:
    found = loaded_by("import flexlora; flexlora.testing.check_method; flexlora.trainers.from_hf")
    assert {"flexlora.testing", "flexlora.trainers"} <= found
    assert set(flexlora._MODULES) <= set(dir(flexlora))


def test_a_name_that_is_not_public_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'flexlora' has no attribute 'no_such_name'"):
        _ = flexlora.no_such_name  # type: ignore[attr-defined]


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import flexlora",
        "from flexlora import Config, load_config, read_records, write_report",
        "import flexlora.report.page",
        "import flexlora.experiment.config_file",
        "import flexlora.cli",
        *(f"import flexlora.{module_of(path)}" for path in FILES if module_of(path).startswith("report.")),
    ],
)
def test_what_people_wait_for_loads_no_heavy_library(statement: str) -> None:
    assert not HEAVY & loaded_by(statement)


def test_merging_needs_no_model_library() -> None:
    found = loaded_by("import flexlora.adapters.merge, flexlora.adapters.inspection, flexlora.adapters.terminal")
    assert not (HEAVY - {"torch"}) & found


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").read_bytes() == b""
