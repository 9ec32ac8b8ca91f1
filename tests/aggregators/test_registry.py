"""Methods are found by name: the package's own, those of a file, and those of an installed package."""

import subprocess
import sys
from pathlib import Path

import pytest

from flexlora.aggregators import registry
from flexlora.aggregators.registry import (
    AGGREGATORS,
    MethodError,
    aggregation_method,
    load_file,
    method_class,
    method_names,
    method_outline,
    package_methods,
    registered_name,
)
from flexlora.aggregators.settings import options_of, traits_of
from flexlora.lora.factors import Scaling

SCALING = Scaling("rslora", 4.0)
METHOD = """
from dataclasses import dataclass
from flexlora.aggregators.registry import aggregation_method
from flexlora.aggregators.settings import Traits, option

@aggregation_method("{name}")
@dataclass(frozen=True)
class Mine:
    "A method."
    scaling: object
    momentum: float = option(0.5, "Share kept.", ge=0)
    traits = Traits(needs_one_rank=True)
"""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    # A module that is imported during a test registers nothing in the next one.
    assert list(AGGREGATORS.values())
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


def written(folder: Path, name: str = "mine", text: str = METHOD) -> str:
    path = folder / "my_methods.py"
    path.write_text(text.format(name=name))
    return str(path)


def test_every_method_of_the_package_registers_the_name_of_its_file() -> None:
    files = {
        path.stem for path in Path(registry.__file__).parent.glob("*.py") if "@aggregation_method" in path.read_text()
    }
    assert {"flexlora", "fedit", "zero_pad"} <= set(package_methods()) == files - {"registry"}
    assert set(package_methods()) <= set(method_names()) == set(AGGREGATORS)
    assert all(AGGREGATORS[name] is method_class(name) for name in package_methods())


def test_the_outline_of_a_method_has_the_options_and_traits_of_its_class() -> None:
    for name in package_methods():
        outline, method = method_outline(name), method_class(name)
        assert options_of(outline) == options_of(method)
        assert traits_of(outline(scaling=None)) == traits_of(method(scaling=SCALING))
    folding = {"fold_tail": True, "server_rank": 3}
    assert traits_of(method_outline("flexlora")(scaling=None, **folding)) == traits_of(
        method_class("flexlora")(scaling=SCALING, **folding)
    )


@pytest.mark.parametrize("name", package_methods())
def test_options_are_read_without_torch(name: str) -> None:
    code = (
        "import sys; from flexlora.experiment.config_file import parse_config; "
        f"parse_config({{'method': {{'name': {name!r}}}}}, 'test').method.traits(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_registers_its_methods(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert set(load_file(path)) == {"mine"}
    found = method_class("mine", path)
    assert found.__name__ == "Mine" and method_outline("mine", path) is found
    # It runs once, and again when it has changed.
    assert method_class("mine", path) is found
    Path(path).write_text(METHOD.format(name="mine").replace("0.5", "0.25"))
    assert options_of(method_class("mine", path))["momentum"].default == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = ", "cannot be run; SyntaxError"),
        ("import no_such_module_at_all", "cannot be run; ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("x = 1", "registers no method; write @aggregation_method"),
        ("import sys; sys.exit(3)", "cannot be run; SystemExit: 3"),
        (METHOD.replace("{name}", "flexlora"), "the package has a method flexlora itself"),
        (METHOD.replace("{name}", "My Method"), "must be a lower-case identifier such as ffa_lora; got 'My Method'"),
    ],
)
def test_a_file_that_gives_no_method_says_why(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(MethodError, match="(?s).*" + words.replace("(", r"\(")):
        load_file(str(path))


def test_names_that_do_not_exist_are_answered_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"must be one of .*fedit, .*flexlora, .*zero_pad.*got 'fedsgd'"):
        method_class("fedsgd")
    with pytest.raises(MethodError, match=r"must be a method of .*my_methods\.py, which has mine; got 'other'"):
        method_class("other", written(tmp_path))
    with pytest.raises(MethodError, match=r"there is no file /nowhere/x\.py"):
        load_file("/nowhere/x.py")
    with pytest.raises(MethodError, match=r"there is no file x\.py in /.*, the current folder"):
        load_file("x.py")
    with pytest.raises(MethodError, match=r"must be a Python file, which ends in \.py; got x\.yaml"):
        load_file("x.yaml")
    with pytest.raises(KeyError):
        AGGREGATORS["no_such_method"]


def test_an_installed_package_offers_methods_by_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "their_methods.py").write_text(METHOD.format(name="theirs"))
    (tmp_path / "their_package-1.0.dist-info").mkdir()
    (tmp_path / "their_package-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n"
    )
    (tmp_path / "their_package-1.0.dist-info" / "entry_points.txt").write_text(
        "[flexlora.methods]\ntheirs = their_methods:Mine\n"
        "noclass = their_methods:__name__\nbroken = their_methods:Missing\n"
    )
    code = """
from flexlora.aggregators.registry import AGGREGATORS, MethodError
from flexlora.experiment.config_file import parse_config
assert "theirs" in AGGREGATORS and AGGREGATORS["theirs"].__name__ == "Mine"
assert parse_config({"method": {"name": "theirs", "momentum": 2}}, "test").method.momentum == 2.0
try:
    AGGREGATORS["broken"]
except MethodError as error:
    assert "the method broken of their_methods:Missing cannot be loaded; AttributeError" in str(error), error
try:
    AGGREGATORS["noclass"]
except MethodError as error:
    assert "an entry point must name a class, and this is a str" in str(error), error
"""
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(registry.__file__).parents[2]}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_class_of_this_process_is_known_by_its_name() -> None:
    @aggregation_method("made_here")
    class MadeHere:
        pass

    assert AGGREGATORS["made_here"] is MadeHere


def test_a_file_does_not_take_the_name_of_a_class_of_this_process(tmp_path: Path) -> None:
    @aggregation_method("mine")
    class Mine:
        pass

    (tmp_path / "other").mkdir()
    found = [method_class("mine", written(folder)) for folder in (tmp_path, tmp_path / "other")]
    assert found[0] is not found[1] and Mine not in found
    assert method_class("mine") is Mine and registered_name(Mine) == "mine"
    for method in found:
        assert sys.modules[method.__module__].Mine is method


def test_a_file_may_import_its_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_method.py").write_text(METHOD.format(name="mine"))
    monkeypatch.syspath_prepend(tmp_path)
    for text in ("from imported_method import Mine\n", "from imported_method import Mine\nx = 1\n"):
        (tmp_path / "outer.py").write_text(text)
        assert set(load_file(str(tmp_path / "outer.py"))) == {"mine"}


def test_a_class_whose_name_another_has_taken_is_told_so() -> None:
    first, second = type("First", (), {}), type("Second", (), {})
    aggregation_method("taken")(first)
    assert registered_name(first) == "taken"
    aggregation_method("taken")(second)
    with pytest.raises(MethodError, match="First is no longer the method taken"):
        registered_name(first)
    with pytest.raises(MethodError, match="Third is not registered"):
        registered_name(type("Third", (second,), {}))
