"""Finds aggregation methods by name: the package's own, those of other packages, and those of a file.

- A method of the package is the class that ``aggregators/NAME.py`` registers as ``NAME``.
- Another package offers a method by an entry point of the group ``flexlora.methods``.
- A configuration names a file with ``method.path``; a class that runs through ``aggregation_method`` registers itself.

Names, options and traits of the package's own methods are read from the source of their files without importing them:
an import would load torch, and a mistake in a configuration has to be told before that.
"""

import __future__

import ast
import difflib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from flexlora.aggregators.settings import OptionError, Traits, option
from flexlora.errors import FlexLoraError

ENTRY_POINTS = "flexlora.methods"
_AVERAGES = {
    "fedavg",
    "fedaverage",
    "avg",
    "average",
    "mean",
    "fedavgm",
    "federatedaveraging",
    "fedprox",
    "fedadam",
    "fedopt",
}
METHOD_FOLDER = Path(__file__).parent

Method = TypeVar("Method", bound=type)

_registered: dict[str, type] = {}
_NAME = "__flexlora_method__"
"""Attribute of a class with the name it was registered under."""


class MethodError(FlexLoraError, ValueError):
    """A method that cannot be found, loaded or registered."""


def aggregation_method(name: str) -> Callable[[Method], Method]:
    """Register the decorated dataclass as the method that configurations call ``name``.

    Its fields are ``scaling``, the scaling rule of the clients, and its options, each made by ``option``. It has the
    functions of ``flexlora.aggregators.base.Aggregator``.

    Raises:
        MethodError: If the name is not a lower-case identifier, or another method has it.
    """
    if not (name.isidentifier() and name == name.lower()):
        raise MethodError(f"the name of a method must be a lower-case identifier such as ffa_lora; got {name!r}")

    def register(method: Method) -> Method:
        file = _own_files().get(name)
        if file is not None and method.__module__ != f"flexlora.aggregators.{name}":
            raise MethodError(f"the package has a method {name} itself ({file.name}); choose another name")
        setattr(method, _NAME, name)
        _registered[name] = method
        return method

    return register


def package_methods() -> tuple[str, ...]:
    """Return the names of the package's own methods, sorted."""
    return tuple(_own_files())


def method_names() -> tuple[str, ...]:
    """Return the names of all methods that are known without loading a file, sorted."""
    return tuple(sorted({*_own_files(), *_entry_points(), *_registered}))


def method_class(name: str, path: str | None = None) -> type:
    """Return the class of a method, imported.

    Args:
        name: As in ``method.name``.
        path: The Python file that registers it; None for methods of the package and of installed packages.

    Raises:
        MethodError: If there is no such method, or its code cannot be loaded.
    """
    if path is not None:
        registered = load_file(path)
        if name not in registered:
            raise MethodError(f"method.name: must be a method of {path}, which has {_listed(registered)}; got {name!r}")
        return registered[name]
    if name not in _registered and name in _own_files():
        importlib.import_module(f"flexlora.aggregators.{name}")
    elif name not in _registered and name in _entry_points():
        _load_entry_point(name)
    if name not in _registered:
        raise MethodError(f"method.name: must be one of {_listed(method_names())}; got {name!r}{_meant(name)}")
    return _registered[name]


def _meant(name: str) -> str:
    """Return which method a name that there is not may have meant, as the end of a message."""
    plain = re.sub("[^a-z0-9]", "", name.lower())
    if plain in _AVERAGES and name not in method_names():
        return "; did you mean fedit (FedAvg of LoRA factors with any optimiser) or fedavg (with SGD)?"
    known = {other.replace("_", ""): other for other in method_names()}
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    return f"; did you mean {known[near[0]]}?" if near else ""


def registered_name(method: type) -> str:
    """Return the name that a class was registered under.

    Raises:
        MethodError: If it was not registered.
    """
    name = vars(method).get(_NAME)
    if name is None:
        raise MethodError(
            f"{method.__name__} is not registered as a method; write @aggregation_method('NAME') above its dataclass"
        )
    if _registered.get(name) is not method:
        raise MethodError(
            f"{method.__name__} is no longer the method {name}; another class has registered that name since. Run the "
            "cell or file that defines it again, or rename one of them"
        )
    return name


def method_outline(name: str, path: str | None = None) -> type:
    """Return a class with the options and the traits of a method; of the package's own, without importing them.

    Construct it with any ``scaling``: nothing but fields and ``traits`` may be used.

    Raises:
        MethodError: As ``method_class``.
    """
    file = None if path is not None else _own_files().get(name)
    return method_class(name, path) if file is None else _outline(file)


def load_file(path: str) -> Mapping[str, type]:
    """Run a Python file, once as long as it does not change, and return the methods it registers by name.

    These are found through their file alone: two files may use the same name, and neither changes what a class of this
    process is registered as.

    Raises:
        MethodError: If there is no such file, it fails, or it registers nothing.
    """
    file = Path(os.path.expanduser(path))
    if file.suffix != ".py":
        raise MethodError(f"method.path: must be a Python file, which ends in .py; got {path}")
    if not file.is_file():
        where = "" if file.is_absolute() else f" in {Path.cwd()}, the current folder"
        raise MethodError(f"method.path: there is no file {path}{where}")
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise MethodError(f"method.path: {path} cannot be read; {error.strerror}") from error
    return _loaded(str(file.resolve()), digest)


class Methods(Mapping[str, type]):
    """All known methods by name; a class is imported when it is asked for."""

    def __getitem__(self, name: str) -> type:
        """Return the class of a method."""
        if name not in method_names():
            raise KeyError(name)
        return method_class(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(method_names())

    def __len__(self) -> int:
        """Return how many there are."""
        return len(method_names())


AGGREGATORS = Methods()
"""Constructed as ``AGGREGATORS[name](scaling=..., **options)``; the fields of the dataclass are the options."""


@cache
def _own_files() -> Mapping[str, Path]:
    """Return name -> file of the package's own methods."""
    return {file.stem: file for file in sorted(METHOD_FOLDER.glob("*.py")) if _method_node(file) is not None}


@cache
def _method_node(file: Path) -> ast.ClassDef | None:
    """Return the definition of the class that a file registers under the file's own name."""
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.ClassDef):
            calls = [decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
            if any(ast.unparse(call) == f"aggregation_method({file.stem!r})" for call in calls):
                return node
    return None


@cache
def _outline(file: Path) -> type:
    """Return the class of a method from its definition alone; its functions lack what the file imports."""
    node = _method_node(file)
    assert node is not None
    node.decorator_list = [call for call in node.decorator_list if not isinstance(call, ast.Call)] + [
        call
        for call in node.decorator_list
        if isinstance(call, ast.Call) and not ast.unparse(call).startswith("aggregation_method(")
    ]
    # Annotations stay text: those of functions name types of other files. Those of options name none.
    flags = __future__.annotations.compiler_flag
    names: dict[str, Any] = {"__name__": __name__, "dataclass": dataclass, "option": option, "Traits": Traits}
    names["OptionError"] = OptionError
    exec(compile(ast.Module([node], []), str(file), "exec", flags, dont_inherit=True), names)
    outline: type = names[node.name]
    for option_name, annotation in outline.__annotations__.items():
        if option_name == "scaling":
            outline.__annotations__[option_name] = object
        else:
            outline.__annotations__[option_name] = eval(annotation, {"Literal": Literal})
    return outline


@cache
def _entry_points() -> Mapping[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load_entry_point(name: str) -> None:
    point = _entry_points()[name]
    try:
        found = point.load()
    except Exception as error:
        raise MethodError(
            f"the method {name} of {point.value} cannot be loaded; {type(error).__name__}: {error}"
        ) from error
    if name not in _registered and isinstance(found, type):
        aggregation_method(name)(found)
    if name not in _registered:
        raise MethodError(
            f"the method {name} of {point.value} cannot be loaded; an entry point must name a class, and this is a "
            f"{type(found).__name__}"
        )


@cache
def _loaded(file: str, digest: str) -> Mapping[str, type]:
    """Return what a file with this SHA-256 registers."""
    module_name = f"flexlora_method_{hashlib.sha256(f'{file} {digest}'.encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and type hints look their module up.
    sys.modules[module_name] = module
    before = dict(_registered)
    try:
        spec.loader.exec_module(module)
        found = {name: method for name, method in _registered.items() if before.get(name) is not method}
    # A script that ends with sys.exit must not end the command that loads it.
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        if isinstance(error, MethodError):
            raise MethodError(f"method.path: {file}: {error}") from error
        raise MethodError(f"method.path: {file} cannot be run; {type(error).__name__}: {error}") from error
    finally:
        # A class of this process that has the same name keeps it.
        for name in [name for name, method in _registered.items() if method.__module__ == module_name]:
            del _registered[name]
            if name in before:
                _registered[name] = before[name]
    # Modules that the file imports run once and register once; what it imported from them counts too.
    found |= {own[_NAME]: one for one in vars(module).values() if isinstance(one, type) and _NAME in (own := vars(one))}
    found = {name: method for name, method in found.items() if name not in _own_files()}
    if not found:
        raise MethodError(
            f"method.path: {file} registers no method; write @aggregation_method('NAME') above its dataclass"
        )
    return found


def _listed(names: object) -> str:
    return ", ".join(sorted(names)) or "none"  # type: ignore[call-overload]
