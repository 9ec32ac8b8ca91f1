"""Lists the aggregation methods with their options and traits, for people and programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flexlora.aggregators.registry import load_file, method_names, method_outline
from flexlora.aggregators.settings import Option, options_of
from flexlora.experiment.method_config import method_model

TABLE_WIDTH = 80
"""Cells below which the options of a method stand one below the other, as columns would be too narrow to read."""


def describe_methods(names: Sequence[str] = (), path: str | None = None) -> dict[str, dict[str, Any]]:
    """Return name -> summary, traits and options of methods as plain values, without importing those of the package.

    Args:
        names: Which; none means all that are known, or all of the file.
        path: A Python file with methods.

    Raises:
        MethodError: If a method cannot be found or loaded.
    """
    chosen = names or (method_names() if path is None else sorted(load_file(path)))
    return {name: _described(name, path) for name in chosen}


def print_methods(console: Console, methods: dict[str, dict[str, Any]]) -> None:
    """Print each method with what it is, its traits and a table of its options."""
    for name, method in methods.items():
        console.print(Text.assemble((name, "bold"), f"  {method['summary']}"))
        traits = [trait if value is True else f"{trait}={value}" for trait, value in method["traits"].items() if value]
        if traits:
            console.print(Text(f"  traits: {', '.join(traits)}"))
        rows = [_cells(name, facts) for name, facts in method["options"].items()]
        if rows and console.width >= TABLE_WIDTH:
            console.print(_table(rows))
        else:
            for setting, default, values, meaning in rows:
                console.print(Text.assemble((setting, "bold"), f"  default {default}; {values}", overflow="fold"))
                console.print(Padding(Text(meaning), (0, 0, 0, 2)))
        console.print()


def _cells(name: str, facts: dict[str, Any]) -> tuple[str, str, str, str]:
    default = "null" if facts["default"] is None else str(facts["default"])
    return f"method.{name}", default, facts["values"], facts["description"]


def _table(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    # A name that is cut or broken cannot be typed; it gives way last of all.
    table.add_column("setting", no_wrap=True, overflow="fold")
    for header in ("default", "values", "meaning"):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _described(name: str, path: str | None) -> dict[str, Any]:
    # The section of a configuration checks that options and traits can be read.
    section = method_model(name, path).model_validate({"name": name, "path": path})
    outline = method_outline(name, path)
    return {
        "summary": (outline.__doc__ or "").strip().split("\n")[0],
        "traits": dataclasses.asdict(section.traits()),
        "options": {
            name: {"default": one.default, "values": _values(one), "description": one.description}
            for name, one in options_of(outline).items()
        },
    }


def _values(option: Option) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{signs.get(rule, rule)} {limit}" for rule, limit in option.rules.items()]
    return " ".join([_type_text(option.annotation), ", ".join(bounds)]).strip()


def _type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if annotation is None or annotation is type(None):
        return "null"
    parts = get_args(annotation)
    return " or ".join(map(_type_text, parts)) if parts else getattr(annotation, "__name__", str(annotation))
