"""The verb ``methods``: shows the aggregation methods."""

from typing import Annotated

import typer

from flexlora.verbs import completion
from flexlora.verbs.arguments import JsonOption
from flexlora.verbs.terminal import out, print_json


def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Methods to show; default all.", autocompletion=completion.methods),
    ] = None,
    path: Annotated[str | None, typer.Option("--path", help="A Python file with methods of your own.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the aggregation methods, with their options and what is special about them."""
    from flexlora.experiment.method_help import describe_methods, print_methods

    described = describe_methods(names or (), path)
    if as_json:
        print_json(described)
    else:
        print_methods(out, described)
